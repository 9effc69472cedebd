"""Changes of arrays in eight bits: a byte for each number, and a scale for each array.

Numbers are rounded at random, up or down, so that their expectation stays what it was (Alistarh et al. 2017, QSGD,
section 3, with a grid for each array and its largest magnitude in place of the norm).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedge.errors import RemoteProtocolError
from fedge.vector import Array as Vector
from fedge.vector import Layout, all_finite
from fedge_flower.asked import Asked
from fedge_flower.layouts import record_of

SCALES_OF: Final = ".fedge-scales"
"""Ends the name of the record with the scales: the record of arrays whose they are has the rest of it."""

_LARGEST: Final = 127


def put(content: RecordDict, name: str, change: Vector, layout: Layout, rng: np.random.Generator) -> None:
    """Make a change of arrays (float32[layout.size], finite) what `content` has under `name`: int8 arrays, and their
    scales, a float32 for each, in a record beside it. Arrays that the layout does not have are left out of it."""
    numbers, scales = ArrayRecord(), ArrayRecord()
    for each, values in layout.views(change).items():
        scale = np.float32(np.abs(values).max(initial=0.0) / _LARGEST)
        numbers[each], scales[each] = Array(_rounded(values, scale, rng)), Array(np.asarray(scale))
    content[name], content[name + SCALES_OF] = numbers, scales


def _rounded(values: Vector, scale: np.float32, rng: np.random.Generator) -> np.ndarray:
    if scale == 0:  # all zeros, or so near that no float32 is between
        return np.zeros(values.shape, np.int8)
    steps = np.asarray(values / scale)  # of no dimension numpy makes a number
    steps += rng.random(values.shape, np.float32)
    return np.clip(np.floor(steps, out=steps), -_LARGEST, _LARGEST, out=steps).astype(np.int8)


def taken(content: RecordDict, asked: Asked) -> RecordDict:
    """The content with arrays as they would be without quantisation, of the types of those that were sent; as it is
    if it has none in eight bits.

    Raises:
        RemoteProtocolError: the arrays or the scales are not what `put` makes.
        ValueError: nothing was sent that they could be a change of.
    """
    beside = {name: content.array_records.get(name + SCALES_OF) for name in content.array_records}
    pairs = {name: scales for name, scales in beside.items() if scales is not None}
    if not pairs:
        return content
    left_out = {name + SCALES_OF for name in pairs}
    found = RecordDict({name: each for name, each in content.items() if name not in left_out})
    for name, scales in pairs.items():
        sent = asked.sent(name)
        values = sent.start + _change(content.array_records[name], scales, sent.layout)
        if not all_finite(values):
            raise RemoteProtocolError(f"record {name[:80]!r}: expected finite numbers, found others")
        found[name] = record_of(values, sent.layout, sent.arrays)
    return found


def _change(numbers: ArrayRecord, scales: ArrayRecord, layout: Layout) -> Vector:
    names = {tensor.name for tensor in layout.tensors}
    if not set(numbers) == set(scales) == names:
        raise RemoteProtocolError(
            f"expected arrays and scales of {sorted(names)[:8]}, found {sorted(numbers)[:8]} and {sorted(scales)[:8]}"
        )
    values = {name: each.numpy() for name, each in numbers.items()}
    for name, each in values.items():
        if each.dtype != np.int8:
            raise RemoteProtocolError(f"{name!r}: expected int8 beside scales, found {each.dtype}")
    change = layout.flatten(values)
    for name, part in layout.views(change).items():
        part *= _scale(name, scales[name])
    return change


def _scale(name: str, found: Array) -> np.float32:
    scale = found.numpy()
    if scale.dtype != np.float32 or scale.shape != () or not 0 <= scale < np.inf:
        raise RemoteProtocolError(f"{name!r}: expected a scale, one float32 of 0 or more, found another")
    return np.float32(scale)
