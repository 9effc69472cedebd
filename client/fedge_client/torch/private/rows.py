"""One row at a time: what of a batch's output and target belongs to one example, and that example's loss.

A task's loss is a mean over a batch, or says so. Here it is only ever called with one example, so that
no loss, however written, lets one example into the gradient of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fedge_client.torch.batches import describe
from fedge_client.torch.private.admission import refuse


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a value (a tensor, or tuples, lists and dicts of them), in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """A value of the same nesting with other tensors. What is neither tensor nor nesting becomes None:
    nobody knows which example it belongs to."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        columns = {key: with_tensors(part, tensors) for key, part in value.items()}
        return columns if type(value) is dict else type(value)(**columns)
    if isinstance(value, tuple | list):
        parts = [with_tensors(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return None


def row_of(value: Any, at: int) -> Any:
    """Row `at` of every tensor, as a batch of one."""
    return with_tensors(value, (tensor[at : at + 1] for tensor in tensors_of(value)))


def check_rows(value: Any, count: int, *, what: str) -> None:
    """Refuse an output or a target whose first dimension is not the batch's.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE.
    """
    for tensor in tensors_of(value):
        if not tensor.ndim or len(tensor) != count:
            refuse(
                f"expected every tensor of {what} to have one row for each of {count} examples, found "
                f"{describe(tensor)}: whose row is whose must be known; leave out what belongs to no example, "
                "and put the batch first"
            )


Loss = Callable[[Any, Any], torch.Tensor]


def row_losses(loss: Loss, output: Any, target: Any) -> torch.Tensor:
    """The loss of each example by itself, float[n], differentiable as the output is.

    Vectorised where torch can; a loss that draws random numbers, or looks at a value, is called in a loop.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; a tensor has no row for each example.
        TaskError: the loss fails.
    """
    rows = tensors_of((output, target))
    count = len(rows[0]) if rows and rows[0].ndim else 0
    check_rows(output, count, what="the model's output")
    check_rows(target, count, what="the target")
    if not rows or not tensors_of(output):
        refuse(f"expected the model's output to be tensors, found {describe(output)}")

    def one(*parts: torch.Tensor) -> torch.Tensor:
        return loss(*with_tensors((output, target), (part.unsqueeze(0) for part in parts)))

    try:
        return torch.func.vmap(one)(*rows)
    except Exception:  # noqa: BLE001  # a loss that cannot be vectorised; its own faults show in the loop
        return torch.stack([one(*(tensor[at] for tensor in rows)) for at in range(count)])
