"""A coordinator and a site's mirror with a fake link between them: the same bits, by the shortest way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import LinkError, RemoteProtocolError
from fedge.events import OrderId
from fedge.optimizer import Kind
from fedge.pipeline import Pipeline, Update
from fedge.strategy import AnyStrategy
from fedge.vector import Array, Layout, Model, Tensor, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import INLINE_BYTES
from fedge_client import holding as holdings
from fedge_client.download import Download
from fedge_client.holding import Holding
from fedge_server.orders import Orders
from fedge_server.shelf import Shelf
from fedge_strategies import FedAvg, MirroredSgd, Scaffold

SMALL, LARGE = 16, INLINE_BYTES // 4 + 8
each_kind = pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])


@dataclass
class Coordinator:
    """The coordinator's side of one run: strategy, orders and shelf."""

    strategy: AnyStrategy
    size: int = SMALL
    shelf: Shelf = field(default_factory=Shelf)
    round: int = 1

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)
        tail = Tensor("mean", (3,), role="buffer")
        self.layout = Layout((Tensor("w", (self.size - 3,)), tail))
        self.state = self.strategy.init(Model(self.vector(), self.layout))
        self.orders = Orders("run", self.shelf)
        self.orders.publish(self.state.model, self.strategy.order(self.state, 1))

    def vector(self) -> Array:
        return self.random.normal(size=self.size).astype(np.float32)

    def step(self, update: Array | None = None) -> None:
        pipeline = Pipeline(self.strategy.reduction)
        vector = self.vector() if update is None else update
        folded = pipeline.fold(pipeline.start(self.size), Update("a", vector, 1))
        self.state = self.strategy.step(self.state, pipeline.finish(folded))
        self.round += 1
        self.orders.publish(self.state.model, self.strategy.order(self.state, self.round))

    def order(self) -> pb.Order:
        """As it arrives at the site."""
        kind = self.strategy.order(self.state, self.round).kind
        self.shelf.grant("a", kind)
        message = self.orders.message(OrderId(kind, self.round), deadline_s=60.0)
        return pb.ServerMessage.FromString(message.SerializeToString()).order


@dataclass
class Link:
    """The site's `Source`: what rides inline, or the shelf; breaks or lies when it is told to."""

    shelf: Shelf
    fetched: list[int] = field(default_factory=list)
    breaks_after: int | None = None
    lies: bool = False
    sent: int = 0

    async def fetch(self, run_id: str, download: Download) -> None:
        self.fetched.append(download.out.nbytes)
        broken = False
        if self.breaks_after is not None:
            self.breaks_after -= 1
            broken = self.breaks_after < 0
        inline = download.complete
        if not inline:
            data = self.shelf.find("a", download.digest)
            assert data is not None, "the order names it"
            rest = data[download.received :]
            part = rest[: 4 * (len(rest) // 8)] if broken else rest
            self.sent += len(part)
            download.take(bytes(len(part)) if self.lies else part)
        if broken:
            raise LinkError("broken")
        if self.lies:
            raise RemoteProtocolError("expected bytes of the announced digest, found others")
        if not inline:
            download.check()


@dataclass
class Site:
    coordinator: Coordinator

    def __post_init__(self) -> None:
        size = self.coordinator.size
        self.model: Array = np.full(size, np.nan, np.float32)
        self.holding = Holding("run", self.coordinator.layout, self.model)
        self.link = Link(self.coordinator.shelf)

    def reach(self) -> None:
        asyncio.run(self.holding.reach(self.coordinator.order(), self.link))

    def check(self) -> None:
        """What is held is the coordinator's, to the bit, and known to be."""
        assert self.model.tobytes() == self.coordinator.state.model.tobytes()
        assert self.holding.digest == digest_of(self.model)

    @property
    def counts(self) -> tuple[int, int]:
        return self.holding.models_fetched, self.holding.gradients_fetched


@each_kind
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["inline", "fetched"])
def test_over_a_hundred_steps_a_mirror_stays_the_same_bits_by_gradients_alone(kind: Kind, size: int):
    coordinator = Coordinator(MirroredSgd(kind, 0.05), size)
    site = Site(coordinator)
    for step in range(101):
        site.reach()
        site.check()
        assert site.counts == (1, step)
        coordinator.step()
    models_and_slots = 1 + 1  # the slots are a fetch of their own, once
    assert site.link.fetched[models_and_slots:] == [4 * size] * 100


def test_a_large_mirror_moves_on_a_thread_to_the_same_bits():
    coordinator = Coordinator(MirroredSgd("adam", 0.05), holdings._ON_THREAD_BYTES // 4 + 1)
    site = Site(coordinator)
    for step in range(3):
        site.reach()
        site.check()
        assert site.counts == (1, step)
        coordinator.step()


@each_kind
def test_a_mirror_that_joins_late_gets_the_model_and_the_slots_and_then_keeps_up(kind: Kind):
    coordinator = Coordinator(MirroredSgd(kind, 0.05))
    for _ in range(7):
        coordinator.step()
    site = Site(coordinator)
    for step in range(10):
        site.reach()
        site.check()
        assert site.counts == (1, step)
        coordinator.step()


@each_kind
def test_a_mirror_that_drifted_is_found_out_and_replaced_and_then_keeps_up(kind: Kind):
    coordinator = Coordinator(MirroredSgd(kind, 0.05))
    site = Site(coordinator)
    site.reach()
    coordinator.step()
    site.model[3] = np.nextafter(site.model[3], np.float32(np.inf))  # one bit, by whatever defect
    site.reach()
    site.check()
    assert site.counts == (2, 1)
    for step in range(5):
        coordinator.step()
        site.reach()
        site.check()
        assert site.counts == (2, 2 + step)


def test_a_mirror_that_missed_a_round_is_sent_the_model():
    coordinator = Coordinator(MirroredSgd("momentum", 0.05))
    site = Site(coordinator)
    site.reach()
    coordinator.step()
    coordinator.step()
    site.reach()
    site.check()
    assert site.counts == (2, 0)


@each_kind
def test_a_step_that_moves_nothing_but_the_optimiser_is_caught_up_with(kind: Kind):
    """The model's digest does not show it, so the next order finds the mirror out and replaces it."""
    coordinator = Coordinator(MirroredSgd(kind, 0.05))
    site = Site(coordinator)
    site.reach()
    coordinator.step(np.zeros(SMALL, np.float32))
    for _ in range(3):
        site.reach()
        site.check()
        coordinator.step()
    assert site.counts[0] <= 2


def test_the_same_order_again_costs_nothing():
    for strategy in (MirroredSgd("adam"), FedAvg()):
        coordinator = Coordinator(strategy)
        site = Site(coordinator)
        site.reach()
        fetched = len(site.link.fetched)
        site.reach()
        site.check()
        assert len(site.link.fetched) == fetched


def test_without_mirrors_each_new_model_is_fetched_whole():
    coordinator = Coordinator(FedAvg())
    site = Site(coordinator)
    for step in range(5):
        site.reach()
        site.check()
        assert site.counts == (step + 1, 0)
        coordinator.step()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sgd", "momentum", "adam"]),
    st.lists(st.sampled_from(["step", "reach", "break 0", "break 1", "lie", "drift"]), max_size=25),
)
def test_whatever_breaks_on_the_way_nothing_is_half_held(kind: Kind, history: list[str]):
    """What the site believes to hold it holds, and the next order that gets through is reached."""
    coordinator = Coordinator(MirroredSgd(kind, 0.05))
    site = Site(coordinator)
    for event in history:
        if event == "step":
            coordinator.step()
        elif event == "drift":
            site.model[0] = np.float32(1e6)
        else:
            site.link.breaks_after = int(event[-1]) if event.startswith("break") else None
            site.link.lies = event == "lie"
            try:
                site.reach()
                if "drift" not in history:
                    site.check()
            except (LinkError, RemoteProtocolError):
                if "drift" not in history:
                    assert site.holding.digest in (b"", digest_of(site.model))
            site.link.breaks_after, site.link.lies = None, False
    coordinator.step()
    site.reach()
    site.check()


def test_a_fetch_that_breaks_leaves_a_mirror_that_can_still_move():
    """A broken gradient has not touched the model: it need not be sent again."""
    coordinator = Coordinator(MirroredSgd("momentum", 0.05))
    site = Site(coordinator)
    site.reach()
    coordinator.step()
    site.link.breaks_after = 0
    with pytest.raises(LinkError):
        site.reach()
    site.link.breaks_after = None
    site.reach()
    site.check()
    assert site.counts == (1, 1)


@pytest.mark.parametrize("cut", [0, 1], ids=["in the model", "in the slots behind it"])
def test_what_broke_off_goes_on_where_it_was(cut):
    coordinator = Coordinator(MirroredSgd("momentum", 0.05), size=LARGE)
    whole = Site(coordinator)
    whole.reach()
    site = Site(coordinator)
    for _ in range(3):
        site.link.breaks_after = cut
        with pytest.raises(LinkError):
            site.reach()
        assert site.holding.digest == b""
        cut = 0
    site.link.breaks_after = None
    site.reach()
    site.check()
    assert site.link.sent == whole.link.sent, "no byte came twice"


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["inline", "fetched"])
def test_a_control_variate_comes_with_each_order_to_train(size: int):
    coordinator = Coordinator(Scaffold(4), size=size)
    site = Site(coordinator)
    for _ in range(3):
        site.reach()
        site.check()
        assert site.holding.control is not None
        assert site.holding.control.tobytes() == coordinator.state.control.tobytes()
        coordinator.step()
    assert not coordinator.orders.message(OrderId("evaluate", 3), deadline_s=60.0).order.HasField("control")
    assert site.link.fetched == [4 * size, 4 * (size - 3)] * 3


def test_a_control_variate_that_broke_off_goes_on_where_it_was_and_the_model_is_not_fetched_again():
    coordinator = Coordinator(Scaffold(4), size=LARGE)
    coordinator.step()
    site = Site(coordinator)
    site.link.breaks_after = 1
    for _ in range(3):
        with pytest.raises(LinkError):
            site.reach()
        assert site.holding.control is None
        site.check()
        site.link.breaks_after = 0
    site.link.breaks_after = None
    site.reach()
    assert site.holding.control is not None
    assert site.holding.control.tobytes() == coordinator.state.control.tobytes()
    assert site.counts == (1, 0)
    assert site.link.sent == 4 * (2 * LARGE - 3), "no byte came twice"


def test_a_model_that_has_changed_meanwhile_is_fetched_from_its_start():
    coordinator = Coordinator(MirroredSgd("momentum", 0.05), size=LARGE)
    site = Site(coordinator)
    site.link.breaks_after = 0
    with pytest.raises(LinkError):
        site.reach()
    coordinator.step()
    site.link.breaks_after = None
    site.reach()
    site.check()


def test_bytes_that_were_not_what_was_announced_are_not_gone_on_with():
    coordinator = Coordinator(MirroredSgd("momentum", 0.05), size=LARGE)
    site = Site(coordinator)
    site.link.lies = True
    with pytest.raises(RemoteProtocolError):
        site.reach()
    site.link.lies = False
    site.reach()
    site.check()


def test_an_order_with_an_optimiser_that_is_none_is_refused_and_the_mirror_is_as_it_was():
    coordinator = Coordinator(MirroredSgd("sgd", 0.05))
    site = Site(coordinator)
    site.reach()
    held = site.model.tobytes()
    coordinator.step()
    order = coordinator.order()
    order.mirror.optimizer.kind = "newton"
    with pytest.raises(RemoteProtocolError, match="'newton'"):
        asyncio.run(site.holding.reach(order, site.link))
    assert site.model.tobytes() == held
    site.reach()
    site.check()
    assert site.counts == (1, 2)


def test_claims_of_another_size_than_the_layouts_are_refused_before_room_is_made():
    coordinator = Coordinator(MirroredSgd("adam", 0.05))
    site = Site(coordinator)
    for part in ("model", "mirror.slots"):
        order = coordinator.order()
        blob = order.model if part == "model" else order.mirror.slots
        blob.size = 2**50
        with pytest.raises(RemoteProtocolError, match="found a claim of"):
            asyncio.run(site.holding.reach(order, site.link))
        assert site.holding.digest == b""
