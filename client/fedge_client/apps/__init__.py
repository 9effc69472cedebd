"""A site's part in Flower apps: their messages, and the processes that run its ClientApps, which alone import flwr."""
