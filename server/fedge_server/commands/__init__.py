"""The command line of the coordinator's role: `fedge server`, `fedge run` and `fedge site`."""
