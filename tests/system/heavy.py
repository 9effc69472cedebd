"""The tiny task with a model of several chunks (5 MB): it takes long enough to travel to be interrupted on the way."""

from __future__ import annotations

import torch
from tiny import bias, data, loss

from fedge import Task

WIDTH = 250_000
MODEL_BYTES = 4 * (5 * WIDTH + 1)


class Heavy(torch.nn.Module):
    """Its hidden units share the output between them, so that any learning rate suits any width."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(3, width)
        self.out = torch.nn.Linear(width, 1)
        torch.nn.init.normal_(self.out.weight)
        self._scale = float(width) ** -0.5

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.out(torch.tanh(self.hidden(inputs)) * self._scale)
        return output


task: Task = Task(model=Heavy, data=data, loss=loss, metrics={"bias": bias})
