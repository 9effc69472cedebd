"""Layouts and flat vectors: a model is one float32 vector plus the layout that names its parts.

Nothing here knows torch or a file. Aggregation, clipping, noise, compression and masking see the
vector; only trainers and checkpoints look at names and shapes.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from fedge.errors import LayoutError

Array = npt.NDArray[np.float32]
"""A flat vector: one-dimensional, contiguous, float32."""

Role = Literal["trainable", "frozen", "buffer"]
"""trainable: receives gradients. frozen: a parameter without. buffer: floating-point state."""

_Kind = tuple[tuple[int, ...], str, str]  # shape, dtype, role
_ROLES: tuple[Role, ...] = get_args(Role)
FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64", "bool")
MAX_RANK = 16
MAX_NAME_BYTES = 512
MAX_TENSORS = 100_000
RESERVED_NAME = "__metadata__"
_PART = 1 << 16
_THREADED_DIGEST_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One floating-point tensor of a model, a slice of the flat vector.

    `dtype` is what the model itself uses; in the vector every element is float32. `tied` are further
    names under which the same storage appears in the model's state dict.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: Role = "trainable"
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Carried:
    """An integer or boolean tensor that travels with the layout: never averaged, clipped or noised.

    `data` holds its initial value, little-endian and C-ordered.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: bytes

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and offsets of a model's parts in its flat vector.

    Tensors are ordered by role, trainable first, so that `vector[:trainable_size]` is what an
    optimiser moves and the rest (frozen parameters, floating-point buffers) is the tail.

    Raises:
        LayoutError: on duplicate names, unknown dtypes, negative sizes or wrong order.
    """

    tensors: tuple[Tensor, ...]
    carried: tuple[Carried, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(names) > MAX_TENSORS:
            raise LayoutError(f"expected at most {MAX_TENSORS} tensors in a model, found {len(names)}")
        for tensor in self.tensors:
            for name in (tensor.name, *tensor.tied):
                _check(name, tensor.shape, tensor.dtype, FLOATS)
            if tensor.role not in _ROLES:
                raise LayoutError(f"{tensor.name!r}: expected a role of {_ROLES}, found {tensor.role!r}")
        for carried in self.carried:
            _check(carried.name, carried.shape, carried.dtype, INTEGERS)
            expected = carried.size * np.dtype(carried.dtype).itemsize
            if len(carried.data) != expected:
                raise LayoutError(f"{carried.name!r}: expected {expected} bytes, found {len(carried.data)}")
        order = [_ROLES.index(tensor.role) for tensor in self.tensors]
        if order != sorted(order):
            raise LayoutError("expected tensors ordered by role: trainable, frozen, buffer")
        if len(set(names)) != len(names):
            twice, _ = Counter(names).most_common(1)[0]
            raise LayoutError(f"expected unique tensor names, found {twice!r} more than once")

    @classmethod
    def of(cls, tensors: Iterable[Tensor], carried: Iterable[Carried] = ()) -> Layout:
        """A layout from tensors in any order; within a role their order is kept."""
        return cls(tuple(sorted(tensors, key=lambda t: _ROLES.index(t.role))), tuple(carried))

    @property
    def names(self) -> list[str]:
        """Every name in the model's state dict, tied names and carried tensors included."""
        own = [name for tensor in self.tensors for name in (tensor.name, *tensor.tied)]
        return own + [carried.name for carried in self.carried]

    @cached_property
    def size(self) -> int:
        """Elements of the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def trainable_size(self) -> int:
        """Elements at the head of the vector that receive gradients."""
        return sum(tensor.size for tensor in self.tensors if tensor.role == "trainable")

    @property
    def nbytes(self) -> int:
        """Bytes of the flat vector, as it travels."""
        return 4 * self.size

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """For each tensor, its slice of the flat vector."""
        out, offset = [], 0
        for tensor in self.tensors:
            out.append(slice(offset, offset + tensor.size))
            offset += tensor.size
        return tuple(out)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over names, shapes, dtypes, roles and order; the carried values are not part of it."""
        out = hashlib.sha256(b"fedge-layout/1")
        for tensor in self.tensors:
            out.update(_canonical(tensor.role, tensor.dtype, tensor.shape, (tensor.name, *tensor.tied)))
        for carried in self.carried:
            out.update(_canonical("carried", carried.dtype, carried.shape, (carried.name,)))
        return out.digest()

    def flatten(self, arrays: Mapping[str, npt.ArrayLike]) -> Array:
        """One float32 vector of `size` elements from a model's arrays, by name.

        Non-contiguous and 0-d arrays are fine; names of carried tensors are ignored.

        Raises:
            LayoutError: a tensor is missing, or its shape differs.
        """
        out: Array = np.empty(self.size, np.float32)
        for tensor, where in zip(self.tensors, self.slices, strict=True):
            if tensor.name not in arrays:
                raise LayoutError(f"expected a tensor named {tensor.name!r}, found none")
            value = np.asarray(arrays[tensor.name])
            if value.shape != tensor.shape:
                raise LayoutError(f"{tensor.name!r}: expected shape {tensor.shape}, found {value.shape}")
            out[where] = value.reshape(-1)
        return out

    def views(self, vector: Array) -> dict[str, Array]:
        """The tensors of `vector` by name, as float32 views that share its memory.

        Raises:
            LayoutError: the vector is not float32[size].
        """
        self.check(vector)
        return {
            tensor.name: vector[where].reshape(tensor.shape)
            for tensor, where in zip(self.tensors, self.slices, strict=True)
        }

    def check(self, vector: Array) -> None:
        """Raise LayoutError unless `vector` is a contiguous float32[size]."""
        if vector.dtype != np.float32 or vector.shape != (self.size,):
            raise LayoutError(
                f"expected a float32 vector of {self.size} elements, "
                f"found {vector.dtype} of shape {vector.shape}"
            )
        if not vector.flags.c_contiguous:
            raise LayoutError(f"expected a contiguous vector, found one with strides {vector.strides}")

    def difference(self, other: Layout) -> str:
        """The first thing in which `other` differs, in words; empty if the layouts are the same."""
        if self.digest == other.digest:
            return ""
        mine: dict[str, _Kind] = {t.name: (t.shape, t.dtype, t.role) for t in self.tensors}
        mine |= {c.name: (c.shape, c.dtype, "integer") for c in self.carried}
        theirs: dict[str, _Kind] = {t.name: (t.shape, t.dtype, t.role) for t in other.tensors}
        theirs |= {c.name: (c.shape, c.dtype, "integer") for c in other.carried}
        for name, (shape, dtype, role) in mine.items():
            if name not in theirs:
                return f"tensor {name!r} is missing"
            if theirs[name] != (shape, dtype, role):
                found = theirs[name]
                return (
                    f"tensor {name!r} should be {role} {dtype}{list(shape)}, "
                    f"is {found[2]} {found[1]}{list(found[0])}"
                )
        for name in theirs:
            if name not in mine:
                return f"tensor {name!r} is not expected"
        return "the order or the tying of the tensors differs"


@dataclass(frozen=True, eq=False)
class Model:
    """A model's values: `vector` float32[layout.size] and the `layout` that names its parts."""

    vector: Array
    layout: Layout

    def __post_init__(self) -> None:
        self.layout.check(self.vector)

    def __repr__(self) -> str:
        return f"Model({len(self.layout.tensors)} tensors, {self.layout.size} elements)"


def bytes_of(vector: npt.NDArray[Any]) -> memoryview:
    """A contiguous vector's memory as bytes, without a copy: what travels, little-endian."""
    return memoryview(vector.data).cast("B")


def all_finite(vector: Array) -> bool:
    """Whether no element is NaN or infinity; looks at a part at a time."""
    parts = (vector[start : start + _PART] for start in range(0, len(vector), _PART))
    return all(np.isfinite(part).all() for part in parts)


def digest_of(data: bytes | memoryview | Array) -> bytes:
    """BLAKE3 of raw bytes or of a contiguous vector, 32 bytes: the content address used on the wire."""
    view = bytes_of(data) if isinstance(data, np.ndarray) else data
    threads = blake3.AUTO if len(view) >= _THREADED_DIGEST_BYTES else 1
    return blake3(view, max_threads=threads).digest()


def new_digest() -> blake3:
    """`digest_of` for bytes that come in parts: call `update` with each, then `digest`."""
    return blake3()


def _check(name: str, shape: tuple[int, ...], dtype: str, known: tuple[str, ...]) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise LayoutError(f"expected a tensor name that is Unicode text, found {name[:40]!r}") from None
    if not 0 < length <= MAX_NAME_BYTES:
        raise LayoutError(f"expected a tensor name of 1 to {MAX_NAME_BYTES} bytes, found {name[:40]!r}")
    if name == RESERVED_NAME:
        raise LayoutError(f"{name!r}: safetensors keeps this name for itself; rename the parameter")
    if dtype not in known:
        raise LayoutError(f"{name!r}: expected a dtype of {', '.join(known)}, found {dtype!r}")
    if len(shape) > MAX_RANK or any(not 0 <= dim < 2**63 for dim in shape):
        raise LayoutError(
            f"{name!r}: expected at most {MAX_RANK} sizes in [0, 2^63), found {shape[: MAX_RANK + 1]}"
        )


def _canonical(role: str, dtype: str, shape: tuple[int, ...], names: tuple[str, ...]) -> bytes:
    """Length-prefixed bytes: two different layouts can never read the same."""
    parts = [f"{role} {dtype}".encode(), *(name.encode() for name in names)]
    head = struct.pack("<II", len(parts), len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + b"".join(struct.pack("<I", len(part)) + part for part in parts)
