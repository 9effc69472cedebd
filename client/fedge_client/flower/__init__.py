"""A Flower client in fedge: as a Task of a native run; and mods for its ClientApp. Needs flwr.

task = task_from(client_app, initial_arrays)     # then `task = "app:task"` in run.toml
client_app = ClientApp(mods=[clip(1.0)])         # wherever it runs
"""

from fedge_client.flower.mods import clip, quantise
from fedge_client.flower.protected import protect_examples
from fedge_client.flower.task import task_from

__all__ = ["clip", "protect_examples", "quantise", "task_from"]
