"""What an app sends is what the other side has, to the bit, whatever it is."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedge.errors import LimitError, RemoteProtocolError
from fedge.records import DTYPES, NATIVE, AppMessage, RawArray
from fedge.records import ArrayRecord as Arrays
from fedge.records import ConfigRecord as Configs
from fedge.records import MetricRecord as Metrics
from fedge.wire import fedge_pb2 as pb
from fedge.wire import records as wire
from fedge_flower.internals import be
from fedge_flower.records import NativeArray, content_of, message_of, plain_of, raw_of, records_of

be(run_id=3, node_id=1)

NAMES = st.text(max_size=8)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
SCALARS = st.one_of(st.booleans(), INTEGERS, st.floats(), st.text(max_size=9), st.binary(max_size=9))
NUMPY = [each for each in DTYPES if each != "bfloat16"]


def lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=4)


ARRAYS = st.sampled_from(NUMPY).flatmap(
    lambda dtype: arrays.arrays(
        np.dtype(dtype), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    )
)
RECORDS = st.one_of(
    st.builds(
        lambda values: ArrayRecord({k: Array(v) for k, v in values.items()}),
        st.dictionaries(NAMES, ARRAYS, max_size=3),
    ),
    st.builds(
        MetricRecord,
        st.dictionaries(
            NAMES, st.one_of(INTEGERS, st.floats(), lists(INTEGERS), lists(st.floats())), max_size=3
        ),
    ),
    st.builds(
        ConfigRecord,
        st.dictionaries(
            NAMES,
            st.one_of(
                SCALARS,
                lists(st.booleans()),
                lists(INTEGERS),
                lists(st.floats()),
                lists(st.text(max_size=3)),
                lists(st.binary(max_size=3)),
            ),
            max_size=3,
        ),
    ),
)


def crossed(plain: AppMessage) -> AppMessage:
    packed = wire.Packed.of(plain)
    about = wire.decode(pb.AppMessage.FromString(wire.encode(packed.about).SerializeToString()))
    return wire.Packed(about, (memoryview(joined(packed.payload)),)).unpacked()


def joined(parts: Any) -> bytearray:
    return bytearray(b"".join(bytes(memoryview(each)) for each in parts))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return np.float64(one).tobytes() == np.float64(other).tobytes() or (one != one and other != other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(content=st.dictionaries(NAMES, RECORDS, max_size=3), group=NAMES)
@settings(max_examples=150, deadline=None)
def test_every_content_comes_back_as_it_went(content: dict[str, Any], group: str):
    be(run_id=3, node_id=1)
    sent = Message(RecordDict(content), 7, "train.fast", group_id=group)
    found = message_of(crossed(plain_of(sent)), run_id=3)
    assert vars(found.metadata) == vars(sent.metadata)
    assert list(found.content) == list(content)
    for name, record in content.items():
        came = found.content[name]
        assert type(came) is type(record)
        assert list(came) == list(record)
        for key, value in record.items():
            if isinstance(value, Array):
                before, after = value.numpy(), came[key].numpy()
                assert (before.dtype, before.shape, before.tobytes()) == (
                    after.dtype,
                    after.shape,
                    after.tobytes(),
                )
                assert Array(before).data == came[key].data
            else:
                assert same(value, came[key])


def test_an_error_crosses_with_its_code_and_its_words():
    reply = Message(Error(8, "it was killed"), reply_to=Message(RecordDict(), 7, "query"))
    found = message_of(crossed(plain_of(reply)), run_id=3)
    assert (found.error.code, found.error.reason, found.has_content()) == (8, "it was killed", False)


def test_the_elements_of_an_array_are_not_copied():
    array = Array(np.arange(1000.0))
    raw = raw_of(array)
    assert np.shares_memory(np.frombuffer(raw.data, np.uint8), np.frombuffer(array.data, np.uint8))
    assert raw_of(NativeArray(raw)) is raw
    assert (raw.dtype, raw.shape, raw.stype, raw.nbytes) == ("float64", (1000,), NATIVE, 8000)


def test_an_app_has_the_arrays_that_came_and_may_do_with_them_what_it_does_with_flowers():
    values = np.arange(6.0).reshape(2, 3)
    found = records_of({"r": Arrays({"x": raw_of(Array(values))})})["r"]["x"]
    assert type(found) is NativeArray
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert copied == found == Array(values)
        assert np.array_equal(copied.numpy(), values)
    assert found != Array(values + 1)


def test_what_a_node_does_to_an_array_is_its_own():
    array = NativeArray(raw_of(Array(np.zeros(3))))
    array.numpy()[:] = 1
    assert array.numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "values",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6).astype(">i4"),
        np.array(5.0),
        np.zeros((0, 3)),
    ],
    ids=["fortran", "big endian", "a number", "nothing"],
)
def test_arrays_of_any_order_come_as_elements(values: np.ndarray):
    raw = raw_of(Array(values))
    assert raw.stype == NATIVE
    assert np.array_equal(NativeArray(raw).numpy(), values)


def test_what_is_no_number_or_was_written_in_another_way_stays_as_it_is():
    words = Array(np.array(["a", "bc"]))
    assert raw_of(words).stype == "numpy.ndarray"
    back = records_of(
        {"r": Arrays({"w": raw_of(words), "b": RawArray("bfloat16", (1,), b"\x80\x3f", "raw")})}
    )
    assert back["r"]["w"].numpy().tolist() == ["a", "bc"]
    assert (back["r"]["b"].dtype, back["r"]["b"].stype, back["r"]["b"].data) == (
        "bfloat16",
        "raw",
        b"\x80\x3f",
    )
    with pytest.raises(TypeError, match="numpy has no bfloat16"):
        NativeArray(RawArray("bfloat16", (1,), b"\x80\x3f")).numpy()


def test_numbers_of_numpy_are_numbers():
    found = content_of(RecordDict({"m": MetricRecord({"loss": np.float64(0.5), "list": [np.float64(1.0)]})}))
    assert found["m"] == Metrics({"loss": 0.5, "list": [1.0]})
    assert type(found["m"].metrics["loss"]) is float  # type: ignore[union-attr]  # it is metrics


CONTENT = {"a": Arrays({"x": RawArray("float32", (2,), b"12345678")})}


def payload(change: Any, body: bytes = b"12345678") -> memoryview:
    """The content with some change, and these for its arrays' bytes."""
    found = pb.AppContent.FromString(bytes(wire.pack(CONTENT)[0])[4:])
    change(found)
    header = found.SerializeToString()
    return memoryview(len(header).to_bytes(4, "little") + header + body)


def twice(found: pb.AppContent) -> None:
    found.records.add().CopyFrom(found.records[0])
    found.records[0].arrays.arrays[0].size = 0
    found.records[0].arrays.arrays[0].shape[:] = [0]


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "too little": (lambda found: None, b"1234567", "expected 8 bytes of arrays, found 7"),
    "another shape": (
        lambda found: found.records[0].arrays.arrays[0].shape.append(2),
        b"12345678",
        "expected 16 bytes",
    ),
    "a type of its own": (
        lambda found: setattr(found.records[0].arrays.arrays[0], "dtype", "O"),
        b"12345678",
        "expected a dtype of int8",
    ),
    "a record twice": (twice, b"12345678", "expected each record once"),
    "no kind": (
        lambda found: found.records[0].ClearField("arrays"),
        b"",
        "expected arrays, metrics or configs",
    ),
    "a huge shape": (
        lambda found: found.records[0].arrays.arrays[0].shape.extend([2**40] * 3),
        b"12345678",
        "expected .* bytes of float32",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_content_that_lies_is_refused_before_anything_is_made_of_it(name: str):
    change, body, says = HOSTILE[name]
    with pytest.raises(RemoteProtocolError, match=says):
        wire.unpack(payload(change, body))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "expected records, found 0 bytes"),
        (b"\x05\0\0\0ab", "expected records of 5 bytes, found 2"),
        (b"\xff\xff\xff\xff", "of at most 16777216 bytes, found 4294967295"),
        (b"\x01\0\0\0\xff", "expected records, found bytes that are none"),
    ],
    ids=["nothing", "cut", "huge", "others"],
)
def test_bytes_that_are_no_content_are_refused(data: bytes, says: str):
    with pytest.raises(RemoteProtocolError, match=says):
        wire.unpack(memoryview(data))


def test_a_message_of_too_many_things_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LimitError, match="at most 64 axes, found 70"):
        wire.unpack(payload(lambda found: found.records[0].arrays.arrays[0].shape.extend([1] * 69)))
    with pytest.raises(LimitError, match="message's kind"):
        wire.decode(pb.AppMessage(kind="x" * 5000))
    with pytest.raises(LimitError, match="error's reason"):
        wire.decode(pb.AppMessage(error=pb.AppError(reason="x" * 70_000)))
    with pytest.raises(RemoteProtocolError, match="expected times"):
        wire.decode(pb.AppMessage(ttl=float("nan")))
    monkeypatch.setattr(wire, "MAX_ENTRIES", 1)
    with pytest.raises(LimitError, match="at most 1 records"):
        wire.unpack(payload(lambda found: None))
    with pytest.raises(LimitError, match="at most 1 records"):
        wire.pack(CONTENT)


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_records_or_are_refused(data: bytes):
    with suppress(RemoteProtocolError, LimitError):
        wire.unpack(memoryview(data))


@pytest.mark.parametrize(
    ("configs", "says"),
    [
        ({"x": 2**63}, "expected integers of 64 bits"),
        ({"x": [1, "a"]}, "of one type"),
        ({"x": None}, "expected a number, a text or bytes, found a NoneType"),
    ],
)
def test_what_no_record_may_hold_is_not_sent(configs: Any, says: str):
    with pytest.raises(ValueError, match=says):
        wire.pack({"c": Configs(configs)})


def test_an_array_is_as_long_as_it_says():
    with pytest.raises(ValueError, match=r"expected 8 bytes of float32\[2\], found 4"):
        RawArray("float32", (2,), b"1234")
    assert RawArray("any", (9,), b"1234", "own").nbytes == 4
