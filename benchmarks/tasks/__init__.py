"""The tasks of the workloads: what floors and fedge train alike."""
