"""The ServerApp's side of a Flower app that runs on a coordinator: what `fedge flower run --admin` needs."""
