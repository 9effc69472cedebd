"""A strategy's state survives being written and read, to the bit; what cannot be written is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import load

from fedge.errors import ConfigError, LayoutError
from fedge.optimizer import Slots
from fedge.pipeline import Aggregate
from fedge.snapshot import TREE_KEY, Snapshot, revive, take
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Layout, Model, Tensor
from fedge_strategies import FedAvg, MirroredSgd, Sgd

FINITE = st.floats(allow_nan=False)
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])


@dataclass(frozen=True, eq=False)
class Inner:
    array: npt.NDArray[Any]
    number: float = 0.0


@dataclass(frozen=True, eq=False)
class Outer:
    model: Array
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    by_client: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    note: str = ""
    count: int = 0
    flag: bool = False


def written_and_read(state: Any, like: Any) -> Any:
    """Through the bytes of a file, as the safetensors package reads them."""
    snapshot = take(state)
    found = load(b"".join(bytes(part) for part in snapshot.parts()))
    return revive(Snapshot(snapshot.tree, found), like)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(two) and all(
            same(getattr(one, name), getattr(two, name)) for name in one.__dataclass_fields__
        )
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, Mapping):
        return set(one) == set(two) and all(same(one[key], two[key]) for key in one)
    return type(one) is type(two) and one == two


any_array = DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=2, min_side=0)))
inners = st.builds(Inner, any_array, FINITE)
outers = st.builds(
    Outer,
    arrays(np.float32, st.integers(0, 5)),
    st.none() | inners,
    st.lists(inners, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=5), any_array, max_size=3),
    st.text(max_size=8),
    st.integers(-(2**63), 2**63),
    st.booleans(),
)


@given(outers)
def test_what_is_taken_is_revived_to_the_bit_by_any_state_of_its_type(state: Outer) -> None:
    assert same(written_and_read(state, Outer(np.zeros(1, np.float32))), state)


@given(outers)
def test_the_bytes_follow_from_the_state(state: Outer) -> None:
    assert [bytes(part) for part in take(state).parts()] == [bytes(part) for part in take(state).parts()]


def test_arrays_that_are_not_contiguous_are_written_as_they_look() -> None:
    state = Outer(np.arange(6, dtype=np.float32)[::2], Inner(np.arange(6).reshape(2, 3).T))
    revived = written_and_read(state, Outer(np.zeros(0, np.float32)))
    assert revived.model.tolist() == [0, 2, 4]
    assert revived.inner.array.tolist() == [[0, 3], [1, 4], [2, 5]]


MODEL = Model(
    np.linspace(-1, 1, 5, dtype=np.float32), Layout((Tensor("w", (4,)), Tensor("b", (1,), role="buffer")))
)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), Sgd("adam"), *(MirroredSgd(kind) for kind in ("sgd", "momentum", "adam"))],
    ids=repr,
)
def test_a_revived_strategy_goes_on_as_if_nothing_had_happened(strategy: AnyStrategy) -> None:
    def aggregate(seed: int) -> Aggregate:
        return Aggregate(np.random.default_rng(seed).normal(size=5).astype(np.float32), ("a",), 1)

    undisturbed = disturbed = strategy.init(MODEL)
    for seed in range(4):
        undisturbed = strategy.step(undisturbed, aggregate(seed))
        disturbed = written_and_read(strategy.step(disturbed, aggregate(seed)), strategy.init(MODEL))
    assert same(undisturbed, disturbed)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "state.inner: .* found object"),
        ([1.0], "found list"),
        ({1: 2.0}, "found dict"),
        (np.array(["x"]), "one of <U1"),
        (np.zeros(1, complex), "complex128"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_with_its_place(value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        take(Outer(np.zeros(1, np.float32), value))


@pytest.mark.parametrize(
    "tree",
    ["", "7", "[]", "{}", '{"fields":{}}', '{"fields":{"unknown":1}}', '{"array":"state.absent"}', '{"x":1}'],
)
def test_a_tree_that_does_not_fit_is_refused(tree: str) -> None:
    with pytest.raises(LayoutError, match="expected a checkpoint of Slots"):
        revive(Snapshot(tree, {}), Slots((np.zeros(1, np.float32),)))


def test_types_never_come_from_a_file() -> None:
    tree = '{"fields":{"vectors":{"fields":{}},"beta1_power":1.0,"beta2_power":1.0}}'
    with pytest.raises(LayoutError, match="expected no dataclass there"):
        revive(Snapshot(tree, {}), Slots(()))


def test_an_array_that_is_in_two_places_is_kept_once_and_comes_back_as_one() -> None:
    array = np.ones(3, np.float32)
    snapshot = take(Outer(array, Inner(array), by_client={"a": array}))
    assert list(snapshot.arrays) == ["state.model"]
    revived = revive(snapshot, Outer(np.zeros(0, np.float32)))
    assert revived.inner is not None
    assert revived.model is revived.inner.array


def test_the_tree_is_in_the_file() -> None:
    snapshot = take(Slots((np.ones(2, np.float32),), 0.5))
    header = next(iter(snapshot.parts()))
    assert TREE_KEY.encode() in bytes(header)
