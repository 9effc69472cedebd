"""Flower's arrays as a flat float32 vector and back: what fedge aggregates, clips and masks."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from flwr.app import Array, ArrayRecord

from fedge.vector import FLOATS, Layout, Model, Role, Tensor
from fedge.vector import Array as Vector


def layout_of(arrays: ArrayRecord, *, buffers: Collection[str] = ()) -> Layout:
    """The floating-point arrays, and no others; no optimiser moves those named in `buffers`."""
    tensors = []
    for name, each in arrays.items():
        if each.dtype in FLOATS:
            role: Role = "buffer" if name in buffers else "trainable"
            tensors.append(Tensor(name, tuple(each.shape), each.dtype, role))
    return Layout.of(tensors)


def vector_of(layout: Layout, arrays: ArrayRecord) -> Vector:
    """float32[layout.size].

    Raises:
        KeyError, LayoutError: an array is missing, or has another shape.
        TypeError: numpy has none of its type (bfloat16).
    """
    return layout.flatten({tensor.name: arrays[tensor.name].numpy() for tensor in layout.tensors})


def model_of(arrays: ArrayRecord, *, buffers: Collection[str] = ()) -> Model:
    """Both; raises as `vector_of`."""
    layout = layout_of(arrays, buffers=buffers)
    return Model(vector_of(layout, arrays), layout)


def record_of(vector: Vector, layout: Layout, like: ArrayRecord) -> ArrayRecord:
    """A vector as arrays of the names, order and types of `like`; what is not in the vector is as it is there."""
    views = layout.views(vector)
    tied = {name: views[tensor.name] for tensor in layout.tensors for name in tensor.tied}
    record = ArrayRecord()
    for name, each in like.items():
        values = views.get(name, tied.get(name))
        record[name] = Array(values.astype(np.dtype(each.dtype))) if values is not None else each
    return record
