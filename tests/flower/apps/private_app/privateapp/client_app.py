"""A node that has patients: its examples are protected, and the function below is never asked."""

import os
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch.utils.data import TensorDataset

from fedge.run import Work
from fedge.task import Site, Task
from fedge_client.flower import protect_examples

WEIGHTS = torch.tensor([[1.0, -2.0, 0.5]])


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(site.config["partition-id"]))
    sets = TensorDataset(x, x @ WEIGHTS.T)
    return sets, sets


task = Task(model=lambda: torch.nn.Linear(3, 1, bias=False), data=data, loss=torch.nn.functional.mse_loss)
folder = os.environ.get("PRIVATE_APP_LEDGER")
protected = protect_examples(
    task,
    clip=1.0,
    noise_multiplier=6.0,
    max_epsilon=6.5,
    delta=1e-5,
    ledger=Path(folder) if folder else None,
    work=Work(steps=10, batch_size="full", learning_rate=0.2),
)
app = ClientApp(mods=[protected])


@app.train()
def train(message: Message, context: Context) -> Message:
    raise AssertionError("the mod answers")
