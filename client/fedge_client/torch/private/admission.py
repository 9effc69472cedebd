"""Which modules can be trained privately, judged by what they are; no data is needed.

What only real examples show (a custom forward that mixes the rows of a batch) is found by
`fedge_client.torch.private.choice`.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from fedge.errors import RefusedError
from fedge.privacy.config import Unit
from fedge.refusal import Refusal, RefusalCode
from fedge_client.torch.private.group_norm import is_batch_norm


def refuse(message: str) -> NoReturn:
    """Raise the typed refusal of a model that cannot be trained privately."""
    raise RefusedError(Refusal(RefusalCode.MODEL_NOT_PRIVATE, message))


def check_private(module: nn.Module, unit: Unit = "example") -> None:
    """Refuse a module that cannot be trained under such privacy, with the reason and the remedy.

    Raises:
        RefusedError: MODEL_NOT_PRIVATE; it keeps statistics of the data in buffers or, at example level,
            normalises by batch statistics or rewrites parameters in its forward.
    """
    for name, part in module.named_modules():
        reason = _objection(part) if unit == "example" else _statistics(part) if unit == "client" else None
        if reason is not None:
            where = f"{name!r} ({type(part).__name__})" if name else f"the model ({type(part).__name__})"
            refuse(f"{where} {reason}")


def _objection(part: nn.Module) -> str | None:
    if is_batch_norm(part):
        return (
            "normalises by statistics of the batch, so that examples depend on each other: use GroupNorm; "
            "fedge_client.torch.private.group_norm_for_batch_norm(model) in the task's model(), once, "
            "before the run exists, replaces every one"
        )
    if isinstance(part, nn.Embedding | nn.EmbeddingBag):
        if part.max_norm is not None:
            return (
                "rewrites the rows that a batch uses, which tells what is in it: max_norm=None; the clipped "
                "gradients bound how far a row can move"
            )
        if part.scale_grad_by_freq:
            return "scales gradients by counts over the batch: scale_grad_by_freq=False"
    return _statistics(part)


def _statistics(part: nn.Module) -> str | None:
    if is_batch_norm(part) and getattr(part, "track_running_stats", True):
        return (
            "keeps running statistics of the data, which would leave un-noised: use GroupNorm; "
            "fedge_client.torch.private.group_norm_for_batch_norm(model) in the task's model(), once, "
            "before the run exists, replaces every one"
        )
    if isinstance(part, _InstanceNorm) and part.track_running_stats:
        return "keeps running statistics of the data, which would leave un-noised: track_running_stats=False"
    if isinstance(part, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values()
    ):
        return (
            "has buffers that training updates, and they would leave un-noised: train without spectral norm"
        )
    return None
