"""The gate: the last code before the wire. What it does not release does not leave, and it says why.

Pure functions. Whether a run takes place here at all is decided before: see `fedge_client.admission`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.exact import MAX_WEIGHT
from fedge.pipeline import Clip, Layer
from fedge.privacy.terms import Terms
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array, Layout, all_finite
from fedge.wire.codec import decode_metrics, encode_metrics


@dataclass(frozen=True, eq=False)
class Released:
    """What may leave: a checked vector (empty for an evaluation), its weight and its metrics."""

    vector: Array
    num_examples: int
    metrics: Mapping[str, float]


def layers_of(clip: float | None) -> tuple[Layer, ...]:
    """What this site does to every update of a run before it leaves."""
    return (Clip(clip),) if clip is not None else ()


def release(
    vector: Array,
    num_examples: int,
    metrics: Mapping[str, float],
    *,
    layout: Layout | None,
    layers: tuple[Layer, ...],
    terms: Terms | None = None,
) -> Released:
    """The update as it may leave; `layout` None is an evaluation, which has no vector.

    **Guarantees.** Under terms of privacy every update weighs 1, metrics leave with evaluations alone, and
    nothing leaves of what no noise is added to (frozen parameters, buffers).

    Raises:
        RefusedError: it is not finite, not of the run's layout, weighs nothing or too much, carries
            metrics that are not finite numbers under short names, or is not as its terms demand.
    """
    if not 1 <= num_examples < MAX_WEIGHT or num_examples != int(num_examples):
        raise _refused(
            RefusalCode.BAD_WEIGHT, f"expected 1 to {MAX_WEIGHT - 1} examples, found {num_examples}"
        )
    num_examples = int(num_examples)  # a task's own training may count with numpy
    if layout is not None:
        _check_vector(vector, layout)  # before the metrics: a model that diverges shows in both
    if terms is not None:
        num_examples, metrics = 1, _private_metrics(metrics, terms, evaluation=layout is None)
        if layout is not None and vector[layout.trainable_size :].any():
            raise _refused(
                RefusalCode.PROTECTION_UNAVAILABLE,
                "training changed a buffer or a frozen parameter, to which no noise is added; keep buffers "
                "constant (GroupNorm instead of BatchNorm)",
            )
    try:
        checked = decode_metrics(encode_metrics(metrics))
    except (RemoteProtocolError, TypeError, ValueError) as error:
        raise _refused(RefusalCode.BAD_METRICS, str(error)) from None
    if layout is None:
        return Released(vector[:0], num_examples, checked)
    for layer in layers:
        vector = layer.encode(vector)
    return Released(vector, num_examples, checked)


def _private_metrics(metrics: Mapping[str, float], terms: Terms, *, evaluation: bool) -> dict[str, float]:
    """What of the metrics may leave: at example level the worker has noised them, at client level the
    coordinator will, for which they are bounded here. Beside an update, none."""
    if not evaluation:
        return {}
    if terms.unit == "example":
        return dict(metrics)
    bounds = {name: terms.loss_bound if name == "loss" else 1.0 for name in metrics}
    return {
        name: min(max(value, 0.0), bounds[name]) if math.isfinite(value) else 0.0
        for name, value in metrics.items()
    }


def _check_vector(vector: Array, layout: Layout) -> None:
    if vector.dtype != np.float32 or vector.shape != (layout.size,):
        raise _refused(
            RefusalCode.WRONG_LENGTH,
            f"expected {layout.size} float32 elements, found {vector.dtype} {vector.shape}",
        )
    if not all_finite(vector):
        raise _refused(
            RefusalCode.NOT_FINITE, "training made an update with NaN or infinity: lower the learning rate"
        )


def _refused(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
