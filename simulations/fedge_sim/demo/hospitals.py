"""The demo's task: the Wisconsin breast cancer data, divided unevenly among five hospitals.

569 biopsies of 30 features each (Wolberg, Street and Mangasarian 1995), from scikit-learn. Three tenths
are held out to judge by; the hospitals differ in size and in how many of their cases are malignant.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedge import Site, Task

HOSPITALS = ("st-mary", "lakeside", "county", "hill-clinic", "harbour")
HELD_OUT = 0.3
SEED = 21

_SIZES = (0.36, 0.27, 0.18, 0.11, 0.08)
_MALIGNANT = (0.37, 0.22, 0.55, 0.30, 0.65)

Index = npt.NDArray[np.int64]


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(30, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    """A hospital's own training and test cases; which hospital is in its `[data]`, or its index."""
    hospital = int(site.config.get("hospital", site.index or 0))
    return hospital_data(hospital)


def hospital_data(hospital: int) -> tuple[TensorDataset, TensorDataset]:
    """The cases of one hospital: four fifths to train on, one fifth to test on."""
    inputs, labels = _standardised()
    members = hospital_indices()[hospital]
    cut = len(members) * 4 // 5
    return _dataset(inputs, labels, members[:cut]), _dataset(inputs, labels, members[cut:])


def pooled() -> TensorDataset:
    """All hospitals' training cases in one place: what federated learning does without."""
    inputs, labels = _standardised()
    members = [part[: len(part) * 4 // 5] for part in hospital_indices()]
    return _dataset(inputs, labels, np.concatenate(members))


def held_out() -> TensorDataset:
    """Cases that no hospital has, to judge every model by."""
    inputs, labels = _standardised()
    return _dataset(inputs, labels, _split(labels)[1])


def hospital_indices() -> list[Index]:
    """Which cases each hospital has: sizes and shares of malignant cases differ; every case is used once."""
    _, labels = _standardised()
    train, _ = _split(labels)
    generator = np.random.default_rng(SEED)
    pools = [list(generator.permutation(train[labels[train] == label])) for label in (0, 1)]
    parts: list[Index] = []
    for size, malignant in zip(_SIZES[:-1], _MALIGNANT[:-1], strict=True):
        count = round(size * len(train))
        bad = min(round(malignant * count), len(pools[0]))  # label 0 is malignant
        chosen = [pools[0].pop() for _ in range(bad)]
        chosen += [pools[1].pop() for _ in range(min(count - bad, len(pools[1])))]
        parts.append(generator.permutation(np.asarray(chosen)))
    parts.append(generator.permutation(np.asarray(pools[0] + pools[1])))
    return parts


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def _split(labels: Index) -> tuple[Index, Index]:
    order = np.random.default_rng(SEED).permutation(len(labels))
    cut = round(len(order) * HELD_OUT)
    return order[cut:], order[:cut]


def _standardised() -> tuple[npt.NDArray[np.float64], Index]:
    """Features scaled by the whole data set's mean and spread, as if from published reference values."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    return (inputs - inputs.mean(axis=0)) / inputs.std(axis=0), labels


def _dataset(inputs: npt.NDArray[np.float64], labels: Index, members: Index) -> TensorDataset:
    return TensorDataset(
        torch.tensor(inputs[members], dtype=torch.float32), torch.tensor(labels[members], dtype=torch.int64)
    )


task: Task = Task(model=model, data=data, loss=cross_entropy, metrics={"accuracy": accuracy})
