"""Flower's messages as plain values and back. Arrays are not copied, nor written as `np.save` does it."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, Error, Message, RecordDict
from flwr.app import ArrayRecord as FlowerArrays
from flwr.app import ConfigRecord as FlowerConfigs
from flwr.app import MetricRecord as FlowerMetrics
from numpy.lib import format as npy

from fedge.errors import RemoteProtocolError
from fedge.records import (
    DTYPES,
    NATIVE,
    AppError,
    AppMessage,
    ArrayRecord,
    ConfigRecord,
    Content,
    MetricRecord,
    RawArray,
)
from fedge_flower.internals import SType, with_id

_NPY_HEADER: Final = 1 << 10
"""Bytes in which the header of an array is that `np.save` has written."""

_PLAIN: Final = (bool, int, float, str, bytes)


class NativeArray(Array):
    """An Array whose elements lie in somebody's memory; as `np.save` writes them they are made only if asked for."""

    def __init__(self, raw: RawArray) -> None:
        self._raw = raw
        self.dtype, self.shape, self.stype = raw.dtype, raw.shape, SType.NUMPY

    @property
    def raw(self) -> RawArray:
        """As it came."""
        return self._raw

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field of Flower's, which nobody sets here
        """As Flower has it."""
        buffer = BytesIO()
        np.save(buffer, self._view(), allow_pickle=False)
        return buffer.getvalue()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine, its = ((each.dtype, each.shape, each.stype, each.data) for each in (self, other))
        return mine == its

    __hash__ = None  # type: ignore[assignment]  # as Flower's

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeArray:
        return NativeArray(RawArray(self._raw.dtype, self._raw.shape, bytes(self._raw.data)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def numpy(self) -> npt.NDArray[Any]:
        """A copy, as Flower gives one."""
        return self._view().copy()

    def _view(self) -> npt.NDArray[Any]:
        if self._raw.dtype == "bfloat16":
            raise TypeError("numpy has no bfloat16")
        return np.frombuffer(self._raw.data, np.dtype(self._raw.dtype)).reshape(self._raw.shape)


def raw_of(array: Array) -> RawArray:
    """An Array's elements, where they lie; what Flower has not written itself stays as it is."""
    if isinstance(array, NativeArray):
        return array.raw
    if array.stype != SType.NUMPY:
        return RawArray(array.dtype, tuple(array.shape), array.data, array.stype)
    found = _elements(array.data)
    return found if found is not None else RawArray(array.dtype, tuple(array.shape), array.data, array.stype)


def _elements(data: bytes) -> RawArray | None:
    """Those of an array that `np.save` has written; None if they are of no dtype that is native."""
    head = BytesIO(data[:_NPY_HEADER])
    try:
        version = npy.read_magic(head)
        shape, is_fortran, dtype = (
            npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        )(head)
    except ValueError:
        return None
    if dtype.name not in DTYPES:
        return None
    if is_fortran or dtype.byteorder == ">":
        values = np.ascontiguousarray(np.load(BytesIO(data), allow_pickle=False), dtype.newbyteorder("<"))
        return RawArray(dtype.name, shape, values.tobytes())
    return RawArray(dtype.name, shape, memoryview(data)[head.tell() :])


def content_of(records: RecordDict) -> Content:
    """Plain values of Flower's.

    Raises:
        TypeError: a record holds what none may.
    """
    found: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for name, record in records.items():
        match record:
            case FlowerArrays():
                found[name] = ArrayRecord({key: raw_of(array) for key, array in record.items()})
            case FlowerMetrics():
                found[name] = MetricRecord({key: _plain(value) for key, value in record.items()})
            case FlowerConfigs():
                found[name] = ConfigRecord({key: _plain(value) for key, value in record.items()})
            case other:
                raise TypeError(
                    f"expected a record of arrays, metrics or configs, found a {type(other).__name__}"
                )
    return found


def records_of(content: Content) -> RecordDict:
    """Flower's, of plain values."""
    records = RecordDict()
    for name, record in content.items():
        match record:
            case ArrayRecord(arrays):
                its = records[name] = FlowerArrays()
                for key, raw in arrays.items():
                    its[key] = _array(raw)  # as they are: from a dict Flower makes others
            case MetricRecord(values):
                records[name] = FlowerMetrics(dict(values))
            case ConfigRecord(values):
                records[name] = FlowerConfigs(dict(values))
    return records


def plain_of(message: Message) -> AppMessage:
    """A message of Flower's, as it goes to others.

    Raises:
        TypeError: a record holds what none may.
    """
    about = message.metadata
    content: Content | AppError
    if message.has_error():
        content = AppError(message.error.code, message.error.reason or "")
    else:
        content = content_of(message.content)
    return AppMessage(
        about.message_id,
        about.message_type,
        about.dst_node_id,
        content,
        about.group_id,
        about.reply_to_message_id,
        about.created_at,
        about.ttl,
        about.src_node_id,
    )


def message_of(plain: AppMessage, *, run_id: int) -> Message:
    """Flower's, of one that has come.

    Raises:
        RemoteProtocolError: it is of no kind that Flower knows.
    """
    body = plain.content
    records = RecordDict() if isinstance(body, AppError) else records_of(body)
    try:
        message = Message(records, dst_node_id=plain.node, message_type=plain.kind)
    except ValueError as error:
        raise RemoteProtocolError(f"expected a message for an app: {error}") from None
    if isinstance(body, AppError):
        message = Message(Error(body.code, body.reason), reply_to=message)
    return with_id(
        message,
        run_id=run_id,
        message_id=plain.id,
        src_node_id=plain.src,
        dst_node_id=plain.node,
        reply_to_message_id=plain.reply_to,
        group_id=plain.group,
        created_at=plain.created_at,
        ttl=plain.ttl,
        message_type=plain.kind,
    )


def _array(raw: RawArray) -> Array:
    if raw.stype == NATIVE:
        return NativeArray(raw)
    return Array(raw.dtype, raw.shape, raw.stype, bytes(raw.data))


def _plain(value: Any) -> Any:
    """Without numpy's types, which are numbers, too."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    for kind in _PLAIN:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)  # type: ignore[arg-type]  # it is a kind of it
    raise TypeError(f"expected a number, a text or bytes, found a {type(value).__name__}")
