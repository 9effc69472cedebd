"""What fedge claims about speed, re-runnable, with the floor measured in the same run. Not installed."""
