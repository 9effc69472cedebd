"""Flower apps on a coordinator: messages between an app's ServerApp, wherever that runs, and the sites' nodes."""
