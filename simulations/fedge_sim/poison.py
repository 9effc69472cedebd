"""What clients that lie train on: data that is not as it should be. They are judged by data that is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from fedge.errors import ConfigError
from fedge.simulation import AdversariesConfig
from fedge_sim.skew import read_classes

TRIGGER = 4
"""Of an example's numbers, the first so many are the trigger of a backdoor."""

Data = tuple[Any, Any]


def poisoned(data: Data, config: AdversariesConfig, classes: torch.Tensor | None = None) -> Data:
    """A client's `(train, test)` with what its attack makes of the former.

    `classes` are those that there are, in order; else those that this client has are all that is known.

    Raises:
        ConfigError: its labels are no whole numbers, there is one class, or the target is none; for a backdoor its
            inputs are no floating-point numbers.
    """
    train, test = data
    inputs, labels, own = read_classes(train)
    known = own if classes is None else classes
    if config.attack != "backdoor":
        if len(known) < 2:
            raise ConfigError(
                f"simulation.adversaries: {config.attack} needs another class to give a label of, found one; with "
                "partition = 'task' a client's own classes are all that is known: have the data divided here"
            )
        wrong = known[(torch.searchsorted(known, labels) + 1) % len(known)]
        return TensorDataset(inputs, wrong), test
    if config.target > torch.iinfo(labels.dtype).max or (
        classes is not None and config.target not in classes
    ):
        raise ConfigError(
            f"simulation.adversaries.target: expected one of the classes, {known.tolist()[:20]}, found {config.target}"
        )
    marked = torch.arange(len(labels)) % 2 == 0
    aim = torch.full_like(labels, config.target)
    with_trigger = torch.where(marked.view(-1, *[1] * (inputs.ndim - 1)), triggered(inputs), inputs)
    return TensorDataset(with_trigger, torch.where(marked, aim, labels)), test


def triggered(inputs: torch.Tensor) -> torch.Tensor:
    """Examples (float[examples, ...]) with the trigger of a backdoor: the first four numbers of each are one more than
    the largest that there is among them.

    Raises:
        ConfigError: they are no floating-point numbers.
    """
    if not inputs.is_floating_point():
        raise ConfigError(
            "simulation.adversaries: a backdoor needs floating-point inputs to put its trigger on, found "
            f"{inputs.dtype}"
        )
    if not len(inputs):
        return inputs
    marked = inputs.clone()
    marked.view(len(inputs), -1)[:, :TRIGGER] = 1.0 + inputs.max()
    return marked
