"""Who trains the clients of a cohort: as a stack in one process, or in several processes."""
