"""safetensors bytes from a model and back, in the model's own names, shapes and dtypes.

Bytes only: files are the shells' business. Tied tensors are written under each of their names, so
that `load_state_dict` takes the result as it is. float64 parameters travel and are averaged as
float32; they are widened again here.

Writing is done here and not by the safetensors package, whose serialiser takes raw pointers and puts
the metadata in random order: the same model is the same bytes. Reading is the package's.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from fedge.errors import LayoutError
from fedge.vector import MAX_RANK, Array, Layout, Model, Tensor

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor in a file: its name, its dtype as numpy calls it (and bfloat16), its shape."""

FORMAT_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
}
_ITEM_BYTES = {dtype: 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize for dtype in FORMAT_NAMES}


def to_safetensors(model: Model, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with every name of the model's state dict. Floats are rounded to nearest even.

    **Guarantees.** The bytes are a function of the model and the metadata.
    """
    entries: list[Entry] = []
    content: dict[str, bytes] = {}
    for tensor, where in zip(model.layout.tensors, model.layout.slices, strict=True):
        data = _encode(model.vector[where], tensor.dtype)
        for name in (tensor.name, *tensor.tied):
            entries.append((name, tensor.dtype, tensor.shape))
            content[name] = data
    for each in model.layout.carried:
        entries.append((each.name, each.dtype, each.shape))
        content[each.name] = each.data
    header, order = safetensors_header(entries, metadata or {})
    return b"".join([header, *(content[name] for name in order)])


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """How a safetensors file with these tensors begins, and in which order their bytes follow.

    The order is the format's own: wide elements first, so that each tensor is aligned; then by name.
    """
    ordered = sorted(entries, key=lambda entry: (-_ITEM_BYTES[entry[1]], entry[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in ordered:
        end = offset + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, [name for name, _, _ in ordered]


def from_safetensors(data: bytes, layout: Layout) -> Model:
    """The model in a safetensors file, if it has exactly the layout's names, shapes and dtypes.

    The caller caps `len(data)` before it reads the file.

    Raises:
        LayoutError: the bytes are not safetensors, or a tensor is missing, unexpected or different.
    """
    try:
        found = dict(deserialize(data))  # type: ignore[no-untyped-call]  # safetensors ships no types
    except SafetensorError as error:
        why = str(error)[:200]
        raise LayoutError(f"expected a safetensors file, found bytes that are not one: {why}") from None
    unexpected = sorted(set(found) - set(layout.names))
    if unexpected:
        raise LayoutError(f"expected the tensors of the run's model, found {unexpected[0][:80]!r} besides")
    vector: Array = np.empty(layout.size, np.float32)
    for tensor, where in zip(layout.tensors, layout.slices, strict=True):
        entry = _entry(found, tensor.name, tensor.shape, tensor.dtype)
        for name in tensor.tied:
            if _entry(found, name, tensor.shape, tensor.dtype) != entry:
                raise LayoutError(f"{name!r}: expected the values of {tensor.name!r}, with which it is tied")
        vector[where] = _decode(entry, tensor)
    for carried in layout.carried:
        _entry(found, carried.name, carried.shape, carried.dtype)
    return Model(vector, layout)


def _entry(found: Mapping[str, Mapping[str, Any]], name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    if name not in found:
        raise LayoutError(f"expected a tensor named {name!r} in the checkpoint, found none")
    entry = found[name]
    actual = (tuple(entry["shape"]), entry["dtype"])
    if actual != (shape, FORMAT_NAMES[dtype]):
        wanted = f"{FORMAT_NAMES[dtype]}{list(shape)}"
        raise LayoutError(f"{name!r}: expected {wanted}, found {actual[1]}{list(actual[0][: MAX_RANK + 1])}")
    return bytes(entry["data"])


def _encode(values: Array, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return _to_bfloat16(values).tobytes()
    return np.ascontiguousarray(values.astype(dtype)).tobytes()


def _decode(data: bytes, tensor: Tensor) -> npt.NDArray[np.float32 | np.float16 | np.float64]:
    if tensor.dtype == "bfloat16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    return np.frombuffer(data, tensor.dtype)


def _to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
