"""The gate: the site's policy as pure functions. What it does not allow does not happen, and says why.

It is asked twice: before a run is joined (may this task run here, for this coordinator?) and before an
update leaves (is it what it claims to be?). The second is the last code before the wire.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.exact import MAX_WEIGHT
from fedge.pipeline import Clip, Layer
from fedge.refusal import Refusal, RefusalCode
from fedge.vector import Array, Layout, all_finite
from fedge.wire.codec import decode_metrics, encode_metrics
from fedge_client.settings import Policy


@dataclass(frozen=True, eq=False)
class Released:
    """What may leave: a checked vector (empty for an evaluation), its weight and its metrics."""

    vector: Array
    num_examples: int
    metrics: Mapping[str, float]


def check_coordinator(policy: Policy, federation: str, *, own: str) -> None:
    """Refuse a coordinator of another federation than the policy allows.

    Raises:
        RefusedError: with the code COORDINATOR_NOT_ALLOWED.
    """
    allowed = policy.coordinators if policy.coordinators is not None else [own]
    if federation not in allowed or federation != own:
        raise _refused(
            RefusalCode.COORDINATOR_NOT_ALLOWED,
            f"federation {federation!r} is not one that this site's policy allows",
        )


def check_task(policy: Policy, task: str, *, folder: Path) -> None:
    """Refuse a task that the site's owner did not allow. Nothing is imported to find out.

    Raises:
        RefusedError: with the code TASK_NOT_ALLOWED.
    """
    if policy.tasks is not None:
        if task in policy.tasks:
            return
        raise _refused(
            RefusalCode.TASK_NOT_ALLOWED,
            f"task {task!r} is not in this site's [policy] tasks: {policy.tasks}",
        )
    if not _is_in(folder, task.partition(":")[0].partition(".")[0]):
        raise _refused(
            RefusalCode.TASK_NOT_ALLOWED,
            f"task {task!r} is not in this site's task folder, and [policy] tasks does not list it",
        )


def check_layout(policy: Policy, layout: Layout) -> None:
    """Refuse a model that is larger than the policy allows, before room is made for it.

    Raises:
        RefusedError: with the code TOO_LARGE.
    """
    if layout.nbytes > policy.max_model_bytes:
        raise _refused(
            RefusalCode.TOO_LARGE,
            f"a model of {layout.nbytes} bytes; this site's policy allows {policy.max_model_bytes}",
        )


def _is_in(folder: Path, module: str) -> bool:
    """Whether `import module` would find it directly in the folder, and no part of it elsewhere."""
    spec = importlib.machinery.PathFinder.find_spec(module, [str(folder), *sys.path])
    if spec is None:
        return False
    # A folder without __init__ gives way to any package of its name on the path, and joins its namesakes.
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    return all(Path(place).parent == folder for place in places)


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
) -> Released:
    """The update as it may leave; `layout` None is an evaluation, which has no vector.

    Raises:
        RefusedError: it is not finite, not of the run's layout, weighs nothing or too much, or carries
            metrics that are not finite numbers under short names.
    """
    if not 1 <= num_examples < MAX_WEIGHT:
        raise _refused(
            RefusalCode.BAD_WEIGHT, f"expected 1 to {MAX_WEIGHT - 1} examples, found {num_examples}"
        )
    if layout is not None:
        _check_vector(vector, layout)  # before the metrics: a model that diverges shows in both
    try:
        checked = decode_metrics(encode_metrics(metrics))
    except (RemoteProtocolError, TypeError, ValueError) as error:
        raise _refused(RefusalCode.BAD_METRICS, str(error)) from None
    if layout is None:
        return Released(vector[:0], num_examples, checked)
    for layer in layers:
        vector = layer.encode(vector)
    return Released(vector, num_examples, checked)


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
