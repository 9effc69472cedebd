"""Layouts and flat vectors: what a layout accepts, what it refuses, and what its digest tells apart."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import LayoutError
from fedge.vector import (
    FLOATS,
    INTEGERS,
    MAX_NAME_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    Carried,
    Layout,
    Model,
    Tensor,
    digest_of,
    new_digest,
)

STEPS = Carried("bn.steps", (), "int64", bytes(8))
LAYOUT = Layout(
    (
        Tensor("w", (2, 3)),
        Tensor("scale", ()),
        Tensor("none", (0, 4)),
        Tensor("embedding", (2,), "float16", "frozen", ("head.weight",)),
        Tensor("bn.mean", (3,), role="buffer"),
    ),
    (STEPS,),
)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {t.name: random.normal(size=t.shape).astype(np.float32) for t in LAYOUT.tensors}


# Order and offsets.


def test_of_orders_tensors_by_role_and_keeps_their_order_within_a_role():
    mixed = [
        Tensor("b1", (1,), role="buffer"),
        Tensor("t1", (1,)),
        Tensor("f1", (1,), role="frozen"),
        Tensor("t2", (1,)),
        Tensor("b2", (1,), role="buffer"),
        Tensor("f2", (1,), role="frozen"),
    ]
    assert [t.name for t in Layout.of(mixed).tensors] == ["t1", "t2", "f1", "f2", "b1", "b2"]


def test_slices_are_adjacent_in_order_and_cover_the_vector():
    assert LAYOUT.slices == (slice(0, 6), slice(6, 7), slice(7, 7), slice(7, 9), slice(9, 12))
    assert LAYOUT.size == 12
    assert LAYOUT.nbytes == 48


def test_the_trainable_size_counts_the_trainable_head_alone():
    assert LAYOUT.trainable_size == 7
    assert Layout((Tensor("f", (5,), role="frozen"),)).trainable_size == 0


def test_a_0d_tensor_has_one_element_and_one_with_a_zero_size_has_none():
    assert Tensor("scale", ()).size == 1
    assert Tensor("none", (3, 0, 2)).size == 0
    assert STEPS.size == 1


def test_names_are_those_of_the_state_dict_with_tied_and_carried_ones():
    assert LAYOUT.names == ["w", "scale", "none", "embedding", "head.weight", "bn.mean", "bn.steps"]


def test_an_empty_layout_has_an_empty_vector():
    empty = Layout(())
    assert (empty.size, empty.trainable_size, empty.slices, empty.names) == (0, 0, (), [])
    assert empty.flatten({}).shape == (0,)
    assert empty.views(np.zeros(0, np.float32)) == {}


def test_a_layout_is_a_frozen_hashable_printable_value():
    same = Layout(LAYOUT.tensors, LAYOUT.carried)
    assert same == LAYOUT
    assert hash(same) == hash(LAYOUT)
    assert "embedding" in repr(LAYOUT)
    with pytest.raises(FrozenInstanceError):
        LAYOUT.tensors = ()  # type: ignore[misc]


# Flat vectors.


def test_flatten_then_views_gives_back_every_array():
    given = arrays()
    vector = LAYOUT.flatten(given)
    assert vector.dtype == np.float32
    assert vector.shape == (LAYOUT.size,)
    for name, view in LAYOUT.views(vector).items():
        np.testing.assert_array_equal(view, given[name])


@pytest.mark.parametrize("name", ["w", "scale", "embedding", "bn.mean"])
def test_views_share_the_memory_of_the_vector(name):
    vector = LAYOUT.flatten(arrays())
    LAYOUT.views(vector)[name][...] = 7.0
    where = LAYOUT.slices[[t.name for t in LAYOUT.tensors].index(name)]
    assert (vector[where] == 7.0).all()
    assert (vector == 7.0).sum() == where.stop - where.start


def test_flatten_takes_transposed_strided_and_fortran_ordered_arrays_by_value():
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    layout = Layout((Tensor("w", (2, 3)),))
    wide = np.zeros((2, 6), np.float32)
    wide[:, ::2] = wanted
    for odd in (wanted.T.copy().T, np.asfortranarray(wanted), wide[:, ::2], wanted[::-1].copy()[::-1]):
        np.testing.assert_array_equal(layout.flatten({"w": odd}), wanted.reshape(-1))


def test_flatten_rounds_wider_numbers_to_float32_and_takes_lists():
    layout = Layout((Tensor("a", (2,), "float64"),))
    assert layout.flatten({"a": [0.1, 2]}).tolist() == [float(np.float32(0.1)), 2.0]
    assert layout.flatten({"a": np.array([1, 2], np.int64)}).tolist() == [1.0, 2.0]


def test_flatten_copies():
    given = arrays()
    vector = LAYOUT.flatten(given)
    vector[:] = 0
    assert given["w"].any()


def test_flatten_ignores_the_arrays_of_carried_and_tied_names():
    extra = arrays() | {"bn.steps": np.int64(3), "head.weight": np.zeros(2)}
    np.testing.assert_array_equal(LAYOUT.flatten(extra), LAYOUT.flatten(arrays()))


def test_flatten_names_the_tensor_that_is_missing():
    given = arrays()
    del given["scale"]
    with pytest.raises(LayoutError, match="expected a tensor named 'scale', found none"):
        LAYOUT.flatten(given)


def test_flatten_refuses_a_shape_that_would_broadcast():
    with pytest.raises(LayoutError, match=r"'w': expected shape \(2, 3\), found \(3,\)"):
        LAYOUT.flatten(arrays() | {"w": np.zeros(3)})
    with pytest.raises(LayoutError, match=r"'scale': expected shape \(\), found \(1,\)"):
        LAYOUT.flatten(arrays() | {"scale": np.zeros(1)})


BAD_VECTORS = {
    "too short": (np.zeros(11, np.float32), "found float32 of shape"),
    "too long": (np.zeros(13, np.float32), "found float32 of shape"),
    "two dimensions": (np.zeros((12, 1), np.float32), "found float32 of shape"),
    "double": (np.zeros(12), "found float64 of shape"),
    "big-endian": (np.zeros(12, ">f4"), "found >f4 of shape"),
    "strided": (np.zeros(24, np.float32)[::2], "expected a contiguous vector"),
    "reversed": (np.zeros(12, np.float32)[::-1], "expected a contiguous vector"),
}


@pytest.mark.parametrize(("vector", "words"), BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_a_vector_that_is_not_contiguous_float32_of_the_right_length_is_refused(vector, words):
    for use in (LAYOUT.check, LAYOUT.views, lambda vector: Model(vector, LAYOUT)):
        with pytest.raises(LayoutError, match=words):
            use(vector)


def test_a_model_prints_its_size_and_not_its_values():
    assert repr(Model(np.zeros(12, np.float32), LAYOUT)) == "Model(5 tensors, 12 elements)"


# Digests.

CHANGES = {
    "a name": lambda t: replace(t, name="other"),
    "a shape": lambda t: replace(t, shape=(3, 2)),
    "a rank": lambda t: replace(t, shape=(6,)),
    "a dtype": lambda t: replace(t, dtype="float16"),
    "a role": lambda t: replace(t, role="frozen"),
    "a tie": lambda t: replace(t, tied=("again",)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_digest_changes_with(change):
    tensors = (Tensor("a", (2, 3)),)
    assert Layout(tuple(map(change, tensors))).digest != Layout(tensors).digest


def test_the_digest_changes_with_the_order_of_tensors_and_of_tied_names():
    a, b = Tensor("a", (2,)), Tensor("b", (2,))
    assert Layout((a, b)).digest != Layout((b, a)).digest
    tied = Tensor("a", (2,), tied=("x", "y"))
    assert Layout((tied,)).digest != Layout((replace(tied, tied=("y", "x")),)).digest


def test_the_digest_changes_with_a_carried_tensor_but_not_with_its_value():
    base = Layout((), (STEPS,))
    assert Layout((), (replace(STEPS, data=b"\1" + bytes(7)),)).digest == base.digest
    for other in (
        replace(STEPS, name="steps"),
        replace(STEPS, shape=(1,)),
        replace(STEPS, dtype="int32", data=bytes(4)),
    ):
        assert Layout((), (other,)).digest != base.digest
    assert Layout(()).digest != base.digest


def test_equal_layouts_made_in_different_ways_have_equal_digests():
    again = Layout.of(iter(LAYOUT.tensors[::-1][:1] + LAYOUT.tensors[:-1]), iter(LAYOUT.carried))
    assert again == LAYOUT
    assert again.digest == LAYOUT.digest
    assert len(again.digest) == 32


def test_names_that_join_to_the_same_text_have_different_digests():
    one = Layout((Tensor("a", (1,), tied=("bc",)),))
    two = Layout((Tensor("ab", (1,), tied=("c",)),))
    three = Layout((Tensor("a", (1,)), Tensor("bc", (1,))))
    assert len({one.digest, two.digest, three.digest}) == 3


NAMES = st.text("ab", min_size=1, max_size=3)
TENSORS = st.builds(
    Tensor,
    NAMES,
    st.lists(st.integers(0, 2), max_size=2).map(tuple),
    st.sampled_from(FLOATS[:2]),
    st.sampled_from(["trainable", "buffer"]),
    st.lists(NAMES, max_size=1).map(tuple),
)


def valid(layout: list[Tensor]) -> Layout | None:
    try:
        return Layout.of(layout)
    except LayoutError:
        return None


LAYOUTS = st.lists(TENSORS, max_size=3).map(valid).filter(lambda layout: layout is not None)


@settings(max_examples=150, deadline=None)
@given(LAYOUTS, LAYOUTS)
def test_digests_are_equal_exactly_when_layouts_are_and_a_difference_has_words(one, two):
    assert (one.digest == two.digest) == (one == two)
    assert (one.difference(two) == "") == (one == two)


# The first bytes of outputs in BLAKE3's own test vectors, whose inputs count 0, 1, ... 250, 0, 1, ...
BLAKE3 = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    8: "2351207d04fc16ade43ccab08600939c7c1fa70a5c0aaca76063d04c3228eaeb",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


@pytest.mark.parametrize("size", BLAKE3)
def test_digest_of_is_blake3_of_the_bytes(size):
    data = bytes(at % 251 for at in range(size))
    assert digest_of(data) == digest_of(memoryview(data)) == bytes.fromhex(BLAKE3[size])
    assert digest_of(np.frombuffer(data, np.float32)) == digest_of(data)


@pytest.mark.parametrize("size", [0, 1000, 9 << 20])
def test_a_digest_of_parts_is_that_of_the_whole(size):
    data = np.random.default_rng(0).bytes(size)
    parts = new_digest()
    for at in range(0, size, 700_001):
        parts.update(data[at : at + 700_001])
    assert parts.digest() == digest_of(data)


# What a layout refuses.

BAD_LAYOUTS = {
    "an unknown dtype": (lambda: Layout((Tensor("a", (1,), "float8"),)), "'a': expected a dtype of float32"),
    "an integer as a tensor": (lambda: Layout((Tensor("a", (1,), "int64"),)), "'a': expected a dtype"),
    "a float as carried": (
        lambda: Layout((), (Carried("a", (1,), "float32", bytes(4)),)),
        "'a': expected a dtype of int8",
    ),
    "an unknown role": (lambda: Layout((Tensor("a", (1,), role="fixed"),)), "'a': expected a role"),
    "an empty name": (lambda: Layout((Tensor("", (1,)),)), "a tensor name of 1 to 512 bytes, found ''"),
    "an empty tied name": (
        lambda: Layout((Tensor("a", (1,), tied=("",)),)),
        "a tensor name of 1 to 512 bytes",
    ),
    "a long name": (lambda: Layout((Tensor("é" * 257, (1,)),)), "a tensor name of 1 to 512 bytes"),
    "a long tied name": (
        lambda: Layout((Tensor("a", (1,), tied=("x" * 513,)),)),
        "a tensor name of 1 to 512 bytes",
    ),
    "half a character": (lambda: Layout((Tensor("\ud800", (1,)),)), "a tensor name that is Unicode text"),
    "safetensors' own name": (lambda: Layout((Tensor("__metadata__", (1,)),)), "keeps this name for itself"),
    "a negative size": (lambda: Layout((Tensor("a", (2, -1)),)), r"'a': .*found \(2, -1\)"),
    "a size past 63 bits": (
        lambda: Layout((Tensor("a", (2**63,)),)),
        r"'a': expected .* sizes in \[0, 2\^63\)",
    ),
    "too many sizes": (lambda: Layout((Tensor("a", (1,) * (MAX_RANK + 1)),)), f"at most {MAX_RANK} sizes"),
    "too few bytes": (
        lambda: Layout((), (Carried("a", (3,), "int32", bytes(11)),)),
        "'a': expected 12 bytes, found 11",
    ),
    "too many bytes": (
        lambda: Layout((), (Carried("a", (0,), "bool", b"\0"),)),
        "'a': expected 0 bytes, found 1",
    ),
    "a name twice": (
        lambda: Layout((Tensor("a", (1,)), Tensor("b", (1,)), Tensor("b", (2,)))),
        "unique tensor names, found 'b'",
    ),
    "a name tied to itself": (
        lambda: Layout((Tensor("a", (1,), tied=("a",)),)),
        "unique tensor names, found 'a'",
    ),
    "a carried name twice": (
        lambda: Layout((Tensor("bn.steps", (1,)),), (STEPS,)),
        "unique tensor names, found 'bn.steps'",
    ),
    "a buffer before a weight": (
        lambda: Layout((Tensor("m", (1,), role="buffer"), Tensor("w", (1,)))),
        "ordered by role: trainable, frozen, buffer",
    ),
    "too many tensors": (
        lambda: Layout(tuple(Tensor(str(n), ()) for n in range(MAX_TENSORS + 1))),
        f"at most {MAX_TENSORS} tensors in a model, found {MAX_TENSORS + 1}",
    ),
    "too many tied names": (
        lambda: Layout((Tensor("a", (), tied=tuple(map(str, range(MAX_TENSORS)))),)),
        f"at most {MAX_TENSORS} tensors in a model",
    ),
}


@pytest.mark.parametrize(("make", "words"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_a_layout_refuses(make, words):
    with pytest.raises(LayoutError, match=words):
        make()


def test_a_repeated_name_among_very_many_is_found_without_comparing_them_all():
    names = [*(str(n) for n in range(MAX_TENSORS - 1)), str(MAX_TENSORS - 2)]
    with pytest.raises(LayoutError, match=f"found '{MAX_TENSORS - 2}' more than once"):
        Layout(tuple(Tensor(name, ()) for name in names))


def test_names_and_shapes_up_to_the_limits_are_accepted():
    assert Layout((Tensor("x" * MAX_NAME_BYTES, (1,) * MAX_RANK),)).size == 1
    assert len(Layout((Tensor("a", (2**63 - 1, 0)),)).digest) == 32


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_is_one_float32_in_the_vector(dtype):
    assert Layout((Tensor("a", (3,), dtype),)).nbytes == 12


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_is_carried_outside_the_vector(dtype):
    layout = Layout((), (Carried("a", (3,), dtype, bytes(3 * np.dtype(dtype).itemsize)),))
    assert layout.size == 0
    assert layout.names == ["a"]


# Differences in words.

DIFFERENCES = {
    "missing": ((), "tensor 'a' is missing"),
    "unexpected": ((Tensor("a", (2, 3)), Tensor("b", ())), "tensor 'b' is not expected"),
    "shape": (
        (Tensor("a", (3, 2)),),
        "tensor 'a' should be trainable float32[2, 3], is trainable float32[3, 2]",
    ),
    "dtype": (
        (Tensor("a", (2, 3), "float16"),),
        "tensor 'a' should be trainable float32[2, 3], is trainable float16[2, 3]",
    ),
    "role": (
        (Tensor("a", (2, 3), role="buffer"),),
        "tensor 'a' should be trainable float32[2, 3], is buffer float32[2, 3]",
    ),
    "tie": ((Tensor("a", (2, 3), tied=("b",)),), "the order or the tying of the tensors differs"),
}


@pytest.mark.parametrize(("tensors", "words"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_is_said_in_words(tensors, words):
    assert Layout((Tensor("a", (2, 3)),)).difference(Layout(tensors)) == words


def test_a_difference_in_a_carried_tensor_is_said_in_words():
    other = replace(STEPS, dtype="int32", data=bytes(4))
    words = "tensor 'bn.steps' should be integer int64[], is integer int32[]"
    assert Layout((), (STEPS,)).difference(Layout((), (other,))) == words
    assert Layout((), (STEPS,)).difference(Layout(())) == "tensor 'bn.steps' is missing"


def test_a_difference_in_order_alone_is_said_in_words():
    a, b = Tensor("a", (2,)), Tensor("b", (2,))
    assert Layout((a, b)).difference(Layout((b, a))) == "the order or the tying of the tensors differs"


def test_layouts_that_differ_in_carried_values_alone_are_the_same():
    assert Layout((), (STEPS,)).difference(Layout((), (replace(STEPS, data=b"\1" * 8),))) == ""
