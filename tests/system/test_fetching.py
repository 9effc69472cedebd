"""Fetch gives a site the bytes that its own open order names, from any offset, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from harness import Federation, initial_model, run_toml
from scripted import Scripted, scripted, status_of, update_of

from fedge.vector import bytes_of, digest_of
from fedge.wire import fedge_pb2 as pb

MANY = 30_001
QUIET = "[evaluation]\nevery = 0\n"
TEXT = run_toml("wide", task="wide:task", rounds=3, size=1, quorum=1, more=QUIET)


@dataclass(frozen=True)
class Fetcher:
    """A site with an open order for a model that does not ride inline, and one that has none."""

    site: Scripted
    stranger: Scripted
    order: pb.Order

    def status(self, **changes: object) -> grpc.StatusCode:
        """The status with which a changed request is refused."""
        request = {"run_id": self.order.run_id, "digest": self.order.model.digest, "offset": 0} | changes
        return status_of(lambda: self.site.fetch(**request))[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fetcher(bare: Federation) -> Iterator[Fetcher]:
    with (
        scripted(bare.address, bare.enrol("fetcher")) as site,
        scripted(bare.address, bare.enrol("stranger")) as stranger,
        bare.submitted(TEXT) as run_id,
    ):
        site.join(run_id)
        yield Fetcher(site, stranger, site.order(run_id))


def test_a_large_model_does_not_ride_inline_and_is_fetched_by_its_digest(fetcher: Fetcher) -> None:
    order = fetcher.order
    assert not order.model.HasField("inline")
    assert order.model.size == 4 * MANY
    data = fetcher.site.fetch(order.run_id, order.model.digest)
    assert digest_of(data) == order.model.digest
    assert data == bytes(bytes_of(initial_model(TEXT).vector))


@pytest.mark.parametrize("offset", [1, 4 * MANY - 1, 4 * MANY])
def test_a_fetch_goes_on_from_any_offset(fetcher: Fetcher, offset: int) -> None:
    order = fetcher.order
    rest = fetcher.site.fetch(order.run_id, order.model.digest, offset=offset)
    assert rest == bytes(bytes_of(initial_model(TEXT).vector))[offset:]


@pytest.mark.parametrize("offset", [4 * MANY + 1, 2**63, 2**64 - 1])
def test_an_offset_past_the_end_is_refused(fetcher: Fetcher, offset: int) -> None:
    assert fetcher.status(offset=offset) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("digest", [b"", b"short", bytes(32), bytes(10_000)])
def test_a_digest_that_no_order_names_is_refused(fetcher: Fetcher, digest: bytes) -> None:
    assert fetcher.status(digest=digest) == grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_run_is_refused(fetcher: Fetcher) -> None:
    assert fetcher.status(run_id="no-such-run") == grpc.StatusCode.FAILED_PRECONDITION


def test_a_site_without_an_order_of_the_run_gets_nothing_of_it(fetcher: Fetcher) -> None:
    order = fetcher.order
    found, _ = status_of(lambda: fetcher.stranger.fetch(order.run_id, order.model.digest))
    assert found == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_of_one_run_is_not_had_through_another(bare: Federation, fetcher: Fetcher) -> None:
    with bare.submitted(
        run_toml("other", task="wide:task", more=QUIET).replace("seed = 7", "seed = 8")
    ) as other:
        fetcher.stranger.join(other)
        assert fetcher.status(run_id=other) == grpc.StatusCode.INVALID_ARGUMENT


def test_an_order_that_is_done_names_nothing_any_more(bare: Federation, fetcher: Fetcher) -> None:
    with bare.submitted(run_toml("done", task="wide:task", rounds=2, more=QUIET)) as run_id:
        for site in (fetcher.site, fetcher.stranger):
            site.join(run_id)
        order = fetcher.site.order(run_id)
        zeros = np.zeros(MANY, np.float32)
        receipt = fetcher.site.deliver(update_of(order, zeros, inline=False), zeros.tobytes())
        assert not receipt.HasField("refusal")
        found = fetcher.status(run_id=run_id, digest=order.model.digest)
        assert found == grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_that_is_judged_can_be_had_after_the_site_was_given_a_newer_one(
    bare: Federation, fetcher: Fetcher
) -> None:
    """Without rounds a site holds an order to train and one to evaluate, on different models."""
    strategy = '[evaluation]\nevery = 1\n[strategy]\nname = "sgd"\n'
    fast, slow = fetcher.stranger, fetcher.site
    step = np.full(MANY, 0.1, np.float32)
    with bare.submitted(run_toml("judging", task="wide:task", rounds=9, more=strategy)) as run_id:
        fast.join(run_id)
        first = fast.order(run_id)
        slow.join(run_id)
        behind = slow.order(run_id)
        assert not fast.deliver(update_of(first, step, inline=False), step.tobytes()).HasField("refusal")
        judge = slow.order(run_id)
        assert judge.id.kind == pb.KIND_EVALUATE
        assert not slow.deliver(update_of(behind, step, inline=False), step.tobytes()).HasField("refusal")
        newer = slow.order(run_id)
        assert len({order.model.digest for order in (behind, judge, newer)}) == 3
        for order in (judge, newer):
            assert digest_of(slow.fetch(run_id, order.model.digest)) == order.model.digest
