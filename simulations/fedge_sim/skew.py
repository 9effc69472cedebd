"""Clients that differ: features that each sees in its own way, and labels that are wrong.

A client's sensor scales and shifts what it measures, the same for all of its examples, in training and in judging;
a share of its training labels is another class's. Both follow from the run's seed and the client's index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from fedge.errors import ConfigError
from fedge.seeds import derive_seed
from fedge_client.torch.batches import examples

Data = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Skew:
    """`features` is the deviation of each client's shift, and of the logarithm of its scale; `labels` the share of
    training labels that are replaced by another class, uniformly."""

    features: float
    labels: float
    seed: int

    def of(self, index: int, data: Data) -> Data:
        """The client's `(train, test)` as it has them.

        Raises:
            ConfigError: its inputs are not floating-point tensors, or its labels no whole numbers.
        """
        train, test = data
        if self.labels:
            train = self._mislabelled(index, train)
        if self.features:
            generator = np.random.default_rng(derive_seed(self.seed, "feature skew", index))
            scale, shift = math.exp(generator.normal(0, self.features)), generator.normal(0, self.features)
            train, test = (_tensors(each, lambda inputs: inputs * scale + shift) for each in (train, test))
        return train, test

    def _mislabelled(self, index: int, train: Any) -> Any:
        inputs, labels, classes = read_classes(train)
        if len(classes) < 2:
            return train  # there is no other class that this client knows of
        generator = np.random.default_rng(derive_seed(self.seed, "label noise", index))
        wrong = torch.from_numpy(generator.random(len(labels)) < self.labels)
        at = torch.searchsorted(classes, labels)
        step = torch.from_numpy(generator.integers(1, len(classes), len(labels)))
        return TensorDataset(inputs, torch.where(wrong, classes[(at + step) % len(classes)], labels))


def read_classes(train: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and the classes that there are, in order.

    Raises:
        ConfigError: the labels are no whole numbers.
    """
    inputs, labels = _read(train)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError(
            "simulation.label_noise, adversaries: expected whole numbers as labels, found "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )
    return inputs, labels, torch.unique(labels)


def _tensors(dataset: Any, change: Any) -> Dataset[Any]:
    inputs, targets = _read(dataset)
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        raise ConfigError(
            "simulation.feature_skew: expected floating-point tensors as inputs, found another kind of them"
        )
    return TensorDataset(change(inputs).to(inputs.dtype), targets)


def _read(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a client's examples, as tensors."""
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1]
    if (
        type(dataset) is Subset
        and type(dataset.dataset) is TensorDataset
        and len(dataset.dataset.tensors) == 2
    ):
        rows = torch.as_tensor(dataset.indices)
        return dataset.dataset.tensors[0][rows], dataset.dataset.tensors[1][rows]
    pairs = [dataset[at] for at in range(examples(dataset))]
    try:
        return torch.stack([torch.as_tensor(x) for x, _ in pairs]), torch.stack(
            [torch.as_tensor(y) for _, y in pairs]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "simulation.feature_skew, label_noise: expected examples of one shape that are tensors or numbers, found "
            f"what raises {type(error).__name__}"
        ) from error
