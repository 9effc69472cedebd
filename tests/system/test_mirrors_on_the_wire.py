"""Mirrored SGD: after a site's first round only gradients travel, and every mirror is the model to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from harness import Federation, run_toml, simulated, until
from scripted import Scripted, scripted, update_of

from fedge.mirror import advance
from fedge.optimizer import Slots
from fedge.vector import Array, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_optimizer

QUIET = "[evaluation]\nevery = 0\n"
GRADIENTS = [np.array(values, np.float32) for values in ([1, 2, 3, 4], [-1, 0, 0.5, 2], [3, 1, -2, 0.1])]


def mirrored(name: str, optimizer: str, *, rounds: int = 4, **arguments: object) -> str:
    strategy = f'[strategy]\nname = "mirrored_sgd"\noptimizer = "{optimizer}"\nlearning_rate = 0.01\n'
    return run_toml(name, rounds=rounds, more=QUIET + strategy, **arguments)  # type: ignore[arg-type]


def array(data: bytes) -> Array:
    return np.frombuffer(data, np.float32).copy()


def slots_of(mirror: pb.Mirror, data: bytes) -> Slots:
    count = decode_optimizer(mirror.optimizer).slot_count
    vectors = tuple(np.split(array(data), count)) if count else ()
    return Slots(vectors, mirror.beta1_power, mirror.beta2_power)


@pytest.fixture
def sites(bare: Federation) -> Iterator[tuple[Scripted, Scripted]]:
    with (
        scripted(bare.address, bare.enrol("old")) as old,
        scripted(bare.address, bare.enrol("new")) as new,
    ):
        yield old, new


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_mirror_moves_by_gradients_alone_and_a_new_one_can_be_made_at_any_round(
    bare: Federation, sites: tuple[Scripted, Scripted], optimizer: str
) -> None:
    old, new = sites
    with bare.submitted(mirrored("mirrors", optimizer, size=1, quorum=1)) as run_id:
        old.join(run_id)
        order = old.order(run_id)
        assert not order.mirror.HasField("advance")
        model = array(order.model.inline)
        slots = slots_of(order.mirror, order.mirror.slots.inline)
        for gradient in GRADIENTS:
            assert not old.hand_in(update_of(order, gradient)).HasField("refusal")
            order = old.order(run_id)
            # The model and the slots are not sent to one that has a mirror: only the gradient is.
            assert not order.model.HasField("inline")
            assert not order.mirror.slots.HasField("inline")
            step = order.mirror.advance
            np.testing.assert_array_equal(array(step.gradient.inline), gradient)
            assert step.from_digest == digest_of(model)
            model, slots = advance(
                decode_optimizer(order.mirror.optimizer), model, slots, gradient, trainable=4
            )
            assert order.model.digest == digest_of(model)
        # A mirror that drifted, or a new one, fetches what it was not sent: both are then the same.
        fetched = old.fetch(run_id, order.model.digest)
        np.testing.assert_array_equal(array(fetched), model)
        if slots.vectors:
            again = slots_of(order.mirror, old.fetch(run_id, order.mirror.slots.digest))
            assert (again.beta1_power, again.beta2_power) == (slots.beta1_power, slots.beta2_power)
            np.testing.assert_array_equal(np.stack(again.vectors), np.stack(slots.vectors))
        # Whoever joins now is told the same: nothing in an order says who it is for.
        old.stream.cancel()
        until(lambda: not bare.ready(run_id), "the old site is gone")
        new.join(run_id)
        theirs = new.order(run_id)
        assert theirs.model == order.model
        np.testing.assert_array_equal(array(new.fetch(run_id, theirs.model.digest)), model)


def test_agents_fetch_a_large_model_once_and_then_only_gradients(federation: Federation) -> None:
    text = mirrored("wide-mirrors", "adam", rounds=5, task="wide:task")
    detail = federation.run(text)
    size = 2 * detail.model_bytes  # two sites
    # At first the model and Adam's two slots; then the mean gradient, however many slots there are.
    assert [row.bytes_down for row in detail.history] == [3 * size, size, size, size, size]
    assert [row.bytes_up for row in detail.history] == [size] * 5
    assert federation.digest(detail.summary.run_id) == simulated(text)
