"""The small data sets that come with scikit-learn: of medicine, of digits, of wine. Nothing is downloaded.

Inputs are standardised column by column (but for the digits, whose pixels become [0, 1]); a fifth of the rows, chosen
by the seed, is the test set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from torch.utils.data import TensorDataset

from fedge.errors import ConfigError
from fedge_sim.data.dataset import dataset_of

Name = Literal["breast_cancer", "digits", "wine", "diabetes"]
NAMES: Final[tuple[Name, ...]] = ("breast_cancer", "digits", "wine", "diabetes")


def bundled(name: Name, *, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """`(train, test)`: breast_cancer 569 x 30 of 2 classes, digits 1797 x 1 x 8 x 8 of 10, wine 178 x 13 of 3, and
    diabetes 442 x 10 with a standardised number for a target, float32[n, 1].

    Raises:
        ConfigError: there is no such set, or scikit-learn is not installed.
    """
    if name not in NAMES:
        raise ConfigError(f"expected one of {', '.join(NAMES)}, found {str(name)[:80]!r}")
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(f"the data set {name!r} needs {error.name}: pip install scikit-learn") from error
    load: Callable[..., Any] = getattr(datasets, f"load_{name}")
    inputs, targets = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(inputs))
    train, test = np.split(order, [len(order) - len(order) // 5])
    if name == "digits":
        inputs = inputs.reshape(-1, 1, 8, 8) / 16
    else:  # by what the training set says alone: the test set is to be unknown
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    if name == "diabetes":
        targets = ((targets - targets[train].mean()) / targets[train].std())[:, None]
    return dataset_of(inputs[train], targets[train]), dataset_of(inputs[test], targets[test])
