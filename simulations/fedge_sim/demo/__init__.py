"""`fedge demo`: five hospitals and a coordinator as separate processes on this machine."""
