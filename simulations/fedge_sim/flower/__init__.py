"""Flower apps on this machine: their ServerApp here, their ClientApps in warm processes."""
