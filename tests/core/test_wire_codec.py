"""What crosses the wire comes back as it was, and whatever a peer sends is at worst refused by type."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import LimitError, RemoteProtocolError
from fedge.events import OrderId
from fedge.optimizer import Optimizer
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.vector import FLOATS, INTEGERS, Carried, Layout, Tensor, digest_of
from fedge.wire import codec
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import MAX_METRICS, MAX_NAME_BYTES, MAX_TEXT_BYTES, Limits, check_size, check_text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
UINT32 = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    names = iter(draw(st.lists(NAMES, unique=True, min_size=8, max_size=8)))
    roles = st.sampled_from(["trainable", "frozen", "buffer"])
    tensors = [
        Tensor(
            next(names),
            draw(SHAPES),
            draw(st.sampled_from(FLOATS)),
            draw(roles),
            (next(names),) if draw(st.booleans()) else (),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    carried = []
    for _ in range(draw(st.integers(0, 2))):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(INTEGERS))
        data = bytes(math.prod(shape) * np.dtype(dtype).itemsize)
        carried.append(Carried(next(names), shape, dtype, data))
    return Layout.of(tensors, carried)


@st.composite
def works(draw: st.DrawFn) -> Work:
    count = st.integers(1, 2**31 - 1)
    length = draw(st.sampled_from([None, "epochs", "steps"]))
    positive, fraction = st.floats(1e-300, 1e300), st.floats(0, 1, exclude_max=True)
    return Work(
        epochs=draw(count) if length == "epochs" else None,
        steps=draw(count) if length == "steps" else None,
        batch_size=draw(st.one_of(count, st.just("full"))),
        optimizer=draw(st.sampled_from(["sgd", "momentum", "adam"])),
        learning_rate=draw(st.floats(1e-300, 1e30)),
        momentum=draw(fraction),
        beta1=draw(fraction),
        beta2=draw(fraction),
        epsilon=draw(positive),
        l1=draw(st.floats(0, 1e30)),
        l2=draw(st.floats(0, 1e30)),
        proximal=draw(st.floats(0, 1e30)),
    )


ORDERS = st.builds(OrderId, st.sampled_from(["train", "gradient", "evaluate"]), UINT32, st.integers(1, 9))
OPTIMIZERS = st.builds(Optimizer, st.sampled_from(["sgd", "momentum", "adam"]), *[NUMBERS] * 5)
REFUSALS = st.builds(Refusal, st.sampled_from(RefusalCode), TEXT.map(codec.printable))
METRICS = st.dictionaries(NAMES, NUMBERS, max_size=5)


def through_bytes(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


# Round trips.


@settings(max_examples=60, deadline=None)
@given(layouts(), works(), OPTIMIZERS, ORDERS, REFUSALS, METRICS)
def test_every_value_comes_back_as_it_was(layout, work, optimizer, order, refusal, metrics):
    assert codec.decode_layout(through_bytes(codec.encode_layout(layout))) == layout
    assert codec.decode_work(through_bytes(codec.encode_work(work))) == work
    assert codec.decode_optimizer(through_bytes(codec.encode_optimizer(optimizer))) == optimizer
    assert codec.decode_order_id(through_bytes(codec.encode_order_id(order))) == order
    assert codec.decode_refusal(through_bytes(codec.encode_refusal(refusal))) == refusal
    update = through_bytes(pb.Update(metrics=codec.encode_metrics(metrics)))
    assert codec.decode_metrics(update.metrics) == metrics


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=64), st.integers(-2, 2))
def test_a_blob_says_what_its_bytes_are_and_few_ride_in_it(data, spare):
    inline_bytes = len(data) + spare
    blob = through_bytes(codec.encode_blob(data, inline_bytes=inline_bytes))
    codec.check_blob(blob, expected_bytes=len(data))
    assert blob.digest == digest_of(data)
    assert blob.HasField("inline") == (len(data) <= inline_bytes)
    assert blob.inline in (data, b"")


def test_every_code_of_a_refusal_has_a_number_of_its_own_that_the_wire_keeps():
    assert len({code.value for code in RefusalCode}) == len(RefusalCode)
    assert min(RefusalCode) > 0, "0 is what an absent number reads as"


# What a peer may send.

VALID: list[tuple[Any, Callable[[Any], object]]] = [
    (codec.encode_order_id(OrderId("train", 3)), codec.decode_order_id),
    (codec.encode_refusal(Refusal(RefusalCode.LATE, "too late")), codec.decode_refusal),
    (
        codec.encode_layout(
            Layout(
                (Tensor("w", (2, 3), tied=("v",)), Tensor("b", ())), (Carried("n", (), "int64", bytes(8)),)
            )
        ),
        codec.decode_layout,
    ),
    (codec.encode_work(Work(epochs=2)), codec.decode_work),
    (codec.encode_optimizer(Optimizer("adam")), codec.decode_optimizer),
    (
        pb.Update(metrics=codec.encode_metrics({"loss": 1.0, "accuracy": 0.5})),
        lambda message: codec.decode_metrics(message.metrics),
    ),
    (codec.encode_blob(b"1234"), lambda message: codec.check_blob(message, expected_bytes=4)),
]


def decode_hostile(kind: Any, data: bytes, decode: Callable[[Any], object]) -> None:
    """Parse and decode as a peer of ours would; anything but a typed refusal escapes."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return  # gRPC answers these by itself
    with suppress(RemoteProtocolError):
        decode(message)


@pytest.mark.parametrize(("valid", "decode"), VALID, ids=lambda each: type(each).__name__)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_and_mangled_bytes_are_refused_by_type(valid, decode, data):
    decode_hostile(type(valid), data.draw(st.binary(max_size=60)), decode)
    mangled = bytearray(valid.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mangled) - 1))
        mangled[at] = data.draw(st.integers(0, 255))
    decode_hostile(type(valid), bytes(mangled), decode)
    decode_hostile(type(valid), bytes(mangled[: data.draw(st.integers(0, len(mangled)))]), decode)


WILD = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1e308]))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_well_formed_messages_of_any_content_are_refused_by_type(data):
    kind, count, number = data.draw(TEXT), data.draw(UINT32), data.draw(WILD)
    tensor = pb.Tensor(name=kind, shape=data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=20)))
    tensor.dtype, tensor.role = data.draw(st.sampled_from(["float32", "O", ""])), "trainable"
    carried = pb.Carried(name=kind, shape=tensor.shape, dtype="int8", data=b"12")
    hostile: list[tuple[Any, Callable[[Any], object]]] = [
        (pb.Layout(tensors=[tensor], carried=[carried]), codec.decode_layout),
        (pb.Layout(carried=[carried]), codec.decode_layout),
        (pb.Work(epochs=count, batch_size=count, learning_rate=number, optimizer=kind), codec.decode_work),
        (pb.Work(steps=count, optimizer="sgd", learning_rate=number, l1=number), codec.decode_work),
        (pb.Optimizer(kind="adam", learning_rate=number, beta1=number), codec.decode_optimizer),
        (pb.OrderId(round=count, attempt=count), codec.decode_order_id),
        (pb.Refusal(code=count, message=kind), codec.decode_refusal),
        (
            pb.Update(metrics=[pb.Metric(name=kind, value=number)] * 2),
            lambda m: codec.decode_metrics(m.metrics),
        ),
        (
            pb.Blob(digest=b"1" * (count % 40), size=count),
            lambda m: codec.check_blob(m, expected_bytes=count),
        ),
    ]
    for message, decode in hostile:
        decode_hostile(type(message), message.SerializeToString(), decode)


BAD: dict[str, tuple[Any, Callable[[Any], object], str]] = {
    "an order of no kind": (pb.OrderId(round=1, attempt=1), codec.decode_order_id, "known kind"),
    "an order without an attempt": (
        pb.OrderId(kind=pb.KIND_TRAIN, round=1),
        codec.decode_order_id,
        "attempt >= 1",
    ),
    "an unknown refusal": (pb.Refusal(code=9999), codec.decode_refusal, "known refusal code, found 9999"),
    "an unknown role": (
        pb.Layout(tensors=[pb.Tensor(name="w", dtype="float32", role="queen")]),
        codec.decode_layout,
        "'queen'",
    ),
    "a name twice": (
        pb.Layout(tensors=[pb.Tensor(name="w", dtype="float32", role="trainable")] * 2),
        codec.decode_layout,
        "unique tensor names",
    ),
    "carried bytes that do not fit": (
        pb.Layout(carried=[pb.Carried(name="n", shape=[2**40], dtype="int64", data=b"1")]),
        codec.decode_layout,
        f"expected {2**43} bytes, found 1",
    ),
    "epochs and steps": (pb.Work(epochs=1, steps=1), codec.decode_work, "not settings of work"),
    "no learning rate": (pb.Work(optimizer="sgd", epsilon=1), codec.decode_work, "learning_rate"),
    "an infinite rate": (
        pb.Optimizer(kind="sgd", learning_rate=math.inf),
        codec.decode_optimizer,
        "finite settings",
    ),
    "an unknown optimiser": (pb.Optimizer(kind="sdg"), codec.decode_optimizer, "'sdg'"),
}


@pytest.mark.parametrize(("message", "decode", "says"), BAD.values(), ids=BAD)
def test_each_bad_message_says_what_was_wrong_with_it(message, decode, says):
    with pytest.raises(RemoteProtocolError, match=says):
        decode(message)


@pytest.mark.parametrize(
    "metrics",
    [
        [pb.Metric(name="", value=1)],
        [pb.Metric(name="a\nb", value=1)],
        [pb.Metric(name="x" * (MAX_NAME_BYTES + 1), value=1)],
        [pb.Metric(name="a", value=1), pb.Metric(name="a", value=2)],
        [pb.Metric(name="a", value=math.nan)],
        [pb.Metric(name="a", value=-math.inf)],
    ],
)
def test_metrics_are_finite_numbers_under_distinct_short_printable_names(metrics):
    with pytest.raises(RemoteProtocolError):
        codec.decode_metrics(metrics)


def test_more_metrics_than_the_cap_are_refused():
    metrics = [pb.Metric(name=f"m{number}", value=1) for number in range(MAX_METRICS + 1)]
    assert len(codec.decode_metrics(metrics[:-1])) == MAX_METRICS
    with pytest.raises(LimitError, match=f"at most {MAX_METRICS} metrics"):
        codec.decode_metrics(metrics)


@pytest.mark.parametrize(
    "blob",
    [
        pb.Blob(digest=bytes(32), size=9),
        pb.Blob(digest=bytes(31), size=8),
        pb.Blob(digest=bytes(32), size=8, inline=bytes(8)),
        pb.Blob(digest=digest_of(bytes(9)), size=8, inline=bytes(9)),
        pb.Blob(digest=digest_of(b""), size=8, inline=b""),
    ],
)
def test_a_blob_whose_claims_do_not_hold_is_refused(blob):
    with pytest.raises(RemoteProtocolError):
        codec.check_blob(blob, expected_bytes=8)


def test_a_layout_that_claims_2_to_the_60_elements_allocates_nothing_and_meets_the_cap():
    tensor = pb.Tensor(name="w", shape=[2**30, 2**30], dtype="float32", role="trainable")
    data = pb.Layout(tensors=[tensor]).SerializeToString()
    tracemalloc.start()
    try:
        layout = codec.decode_layout(pb.Layout.FromString(data))
        assert layout.size == 2**60
        assert len(layout.digest) == 32
        with pytest.raises(LimitError, match=f"at most {4 << 30} bytes, found {2**62}"):
            Limits().check_model(layout.nbytes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# Text of a peer's ends in logs and terminals.


@given(st.text(max_size=60), st.integers(10, 40))
def test_text_is_made_printable_and_cut_to_bytes(text, cap):
    shown = codec.shorten(codec.printable(text), cap=cap)
    assert shown.isprintable()
    assert len(shown.encode()) <= cap


def test_a_refusal_of_any_length_and_with_text_that_is_no_unicode_can_be_sent():
    for message in ("x" * 10_000, "file \udcff of the site", "\N{SNOWMAN}" * 1_000):
        sent = through_bytes(codec.encode_refusal(Refusal(RefusalCode.TASK_FAILED, message)))
        assert 0 < len(sent.message.encode()) <= MAX_TEXT_BYTES
    escape = pb.Refusal(code=RefusalCode.LATE, message="a\x1b[31mb\nc")
    assert codec.decode_refusal(escape).message == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}c"


def test_sizes_and_texts_are_checked_against_their_caps():
    assert check_size("a vector", 8, 8) == 8
    with pytest.raises(LimitError, match="a vector of at most 8 bytes, found 9"):
        check_size("a vector", 9, 8)
    assert check_text("an id", "run-1") == "run-1"
    for text in ("", "a\tb", "x" * (MAX_NAME_BYTES + 1)):
        with pytest.raises(LimitError, match="an id of 1 to"):
            check_text("an id", text)
