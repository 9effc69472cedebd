"""The floors: the least that each workload can cost, written without fedge. Each runs as a process of its own."""
