"""What every loader gives: inputs and targets as tensors, and of whom each example is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset


def dataset_of(
    inputs: npt.NDArray[Any], targets: npt.NDArray[Any], groups: npt.NDArray[Any] | None = None
) -> TensorDataset:
    """float32[n, ...] inputs, and targets int64[n] if they are whole numbers, else float32[n, ...].

    `groups` is [n] of numbers or texts. The dataset is a plain TensorDataset, so that batches of it are gathered fast.

    Raises:
        ValueError: they are not of one length.
    """
    if len(inputs) != len(targets) or (groups is not None and len(groups) != len(inputs)):
        raise ValueError("expected as many targets, and groups, as inputs")
    whole = np.issubdtype(targets.dtype, np.integer)
    made = TensorDataset(
        torch.from_numpy(np.ascontiguousarray(inputs, np.float32)),
        torch.from_numpy(np.ascontiguousarray(targets, np.int64 if whole else np.float32)),
    )
    if groups is not None:
        made.groups = np.asarray(groups)  # type: ignore[attr-defined]  # for fedge_sim.population, which looks for it
    return made
