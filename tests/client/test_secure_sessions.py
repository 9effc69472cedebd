"""A site's sessions: keys are shown for an order at once, and again, whatever the way to the directory is like."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from authorities import enrolled, new_authority
from one_site import LARGE, SIZE, offer

from fedge.errors import BusyError, LinkError, RefusedError
from fedge.events import OrderId
from fedge.refusal import RefusalCode
from fedge.run import Work
from fedge.secagg.directory import Directory, Statement
from fedge.secagg.site import Rules
from fedge.secagg.terms import SumTerms
from fedge.signing import SignedDirectory, public_bytes
from fedge.vector import Layout, Tensor
from fedge.wire import fedge_pb2 as pb
from fedge.wire.agreed import offer_digest
from fedge.wire.codec import encode_blob, encode_order_id
from fedge.wire.keys import encode_directory
from fedge_client import secure_sessions
from fedge_client.directory import KnownDirectory
from fedge_client.gate import Released
from fedge_client.holding import Holding
from fedge_client.participation import Participation
from fedge_client.protection import Protection
from fedge_client.secure_sessions import SecureSessions
from fedge_client.spent import SpentRounds

NOW = datetime.now(UTC).replace(microsecond=0)
ORDER = OrderId("train", 1)
RELEASED = Released(np.zeros(SIZE, np.float32), 3, {})


@dataclass
class Site:
    """Its sessions, and a coordinator that serves the directory once it was asked often enough."""

    folder: Path
    troubles: list[LinkError] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        authority = new_authority(self.folder / "server", now=NOW)[0]
        identity = enrolled(authority, "icu-1", now=NOW)
        start = int(NOW.timestamp()) - 60
        statements = [
            Statement("icu-1", public_bytes(identity.signing), start, start + 86_400),
            Statement("icu-2", b"o" * 32, start, start + 86_400),
        ]
        directory = Directory.of(authority.federation, 1, statements)
        self.directory = encode_directory(SignedDirectory(directory, directory.sign(authority.issuer.key)))
        self.sent: list[pb.ClientMessage] = []
        self.failed: list[tuple[str, OrderId]] = []
        self.sessions = SecureSessions(
            identity,
            KnownDirectory.open(self.folder, identity),
            SpentRounds(self.folder / "secure"),
            rules=Rules(),
            send=self.sent.append,
            failed=lambda run_id, order: self.failed.append((run_id, order)),
        )
        layout = Layout((Tensor("w", (SIZE,)),))
        self.run = Participation(
            run_id="run",
            layout=layout,
            clip=None,
            protection=Protection(),
            kind="train",
            terms=offer_digest(offer()),
            work=Work(),
            secure=SumTerms(least=3, clients=4, bound=1.0),
            holding=Holding("run", layout, np.zeros(SIZE, np.float32)),
            update=np.zeros(SIZE, np.float32),
        )

    async def keys(self) -> pb.Directory:
        if self.troubles:
            raise self.troubles.pop(0)
        return self.directory

    def play(self, *orders: pb.Order, seconds: float = 0.5) -> None:
        """Handle these orders, and whatever comes of them in this time."""

        async def scenario() -> None:
            at_work = asyncio.create_task(self.sessions.run())
            for order in orders:
                self.sessions.order(self.run, order, self)
            await asyncio.sleep(seconds)
            at_work.cancel()

        asyncio.run(scenario())


def order(attempt: int = 1, *, epoch: int = 1, model: bytes = b"m") -> pb.Order:
    id = encode_order_id(OrderId("train", 1, attempt))
    return pb.Order(run_id="run", id=id, model=encode_blob(model), secure=pb.SecureOrder(epoch=epoch))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(secure_sessions, "pause_s", lambda error, failures: 0.01)
    return Site(tmp_path)


def test_an_order_that_is_sent_again_is_answered_with_the_same_keys(site: Site):
    site.play(order(), order())
    first, second = (message.advertise for message in site.sent)
    assert first == second
    assert first.member.site == "icu-1"


def test_a_directory_that_cannot_be_had_for_a_moment_is_asked_for_again(site: Site):
    site.troubles = [BusyError("8 downloads"), LinkError("broken")]
    site.play(order())
    assert [message.WhichOneof("kind") for message in site.sent] == ["advertise"]
    assert not site.failed


def test_over_a_link_that_is_closed_nothing_is_asked_again(site: Site):
    site.troubles, site.closed = [LinkError("closed")], True
    site.play(order())
    assert site.sent == []
    site.closed = False
    site.play(order())  # over the next link
    assert [message.WhichOneof("kind") for message in site.sent] == ["advertise"]


def test_keys_of_another_epoch_cost_the_site_its_part_and_its_work_is_called_off(site: Site):
    site.play(order(epoch=7))
    (message,) = site.sent
    assert message.failed.refusal.code == RefusalCode.ROSTER_INVALID
    assert site.failed == [("run", ORDER)]


def test_no_keys_are_shown_twice_for_an_attempt_by_an_agent_that_was_started_again(site: Site):
    site.play(order())
    site.sessions._sessions.clear()
    site.sent.clear()
    site.play(order())
    (message,) = site.sent
    assert message.failed.refusal.code == RefusalCode.UPDATE_LOST


def test_what_waits_for_a_sum_hears_that_it_is_called_off_and_pays_for_nothing(site: Site):
    async def never() -> None:
        raise AssertionError("nothing was masked")

    async def scenario() -> None:
        site.sessions.order(site.run, order(), site)
        masking = asyncio.create_task(site.sessions.mask(order(), RELEASED, pay=never))
        await asyncio.sleep(0)
        site.sessions.drop("run", ORDER)
        with pytest.raises(RefusedError) as called_off:
            await masking
        assert called_off.value.refusal.code == RefusalCode.CANCELLED
        for late in (order(), order(2), order(model=b"x" * LARGE)):
            with pytest.raises(RefusedError, match="is over"):
                await site.sessions.mask(late, RELEASED, pay=never)

    asyncio.run(scenario())
