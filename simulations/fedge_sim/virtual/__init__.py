"""Virtual time: what clients' devices are like, when they are there, and what happens when."""
