"""A site's part in an app, without a coordinator: what it says in each session, and what breaks of links leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import LinkError, RemoteProtocolError
from fedge.records import AppMessage, node_id
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_blob
from fedge.wire.limits import INLINE_BYTES
from fedge.wire.records import encode, encode_values, pack
from fedge_client.apps import one_run, taking_part
from fedge_client.apps.taking_part import Apps
from fedge_client.download import Download
from fedge_client.settings import ClientSettings, FlowerSettings

APP = Path(__file__).parents[1] / "flower/apps/unruly"
CONFIG = {"how": "", "report.path": "", "gate.path": "", "timeout": 1.0}
NODE = node_id("a", 0)
SMALL = b"".join(bytes(part) for part in pack({}))


class FakeLink:
    """Gives what is fetched when it is let to, until it is closed."""

    def __init__(self, data: bytes = b"") -> None:
        self.closed = False
        self.data = data
        self.fetches = 0
        self.offsets: list[int] = []
        self.gate = asyncio.Event()
        self.breaks_after: int | None = None

    async def fetch(self, run_id: str, download: Download) -> None:
        self.fetches += 1
        self.offsets.append(download.received)
        if self.breaks_after is not None:
            download.take(self.data[: self.breaks_after])
            self.breaks_after = None
            raise LinkError("the link broke")
        await self.gate.wait()
        download.take(self.data[download.received :])
        download.check()


class Site:
    def __init__(self, folder: Path, **flower: Any) -> None:
        settings = ClientSettings(
            server="127.0.0.1:1",
            flower=FlowerSettings(
                **{"apps": {"fedge-tests/unruly": str(APP)}, "nodes": [{"partition-id": 0}], **flower}
            ),
        )
        self.said: list[pb.ClientMessage] = []
        self.apps = Apps(settings, folder, "a", self._post)
        self.link = FakeLink()

    async def _post(self, message: pb.ClientMessage) -> None:
        self.said.append(message)

    def hear(self, **message: Any) -> None:
        self.apps.hear(pb.ServerMessage(**message), self.link)  # type: ignore[arg-type]  # a few lines of it

    def offer(self, run_id: str = "run") -> None:
        config = encode_values(CONFIG)
        self.hear(
            app_offer=pb.AppOffer(run_id=run_id, app="fedge-tests/unruly", version="1.0.0", config=config)
        )

    def order(self, id: str, blob: pb.Blob | None = None, *, left_s: float = 100.0) -> None:
        about = AppMessage(id, "train", NODE, {}, ttl=left_s, src=1)
        order = pb.AppOrder(run_id="run", message=encode(about, blob or encode_blob(SMALL)), left_s=left_s)
        self.hear(app_order=order)

    def forget(self, *ids: str) -> None:
        self.hear(app_forget=pb.AppIds(run_id="run", ids=ids))

    async def says(self, kind: str, *, count: int = 1) -> list[Any]:
        """What it says of one kind, once it has said so much of it."""
        async with asyncio.timeout(60):
            while len(found := [getattr(m, kind) for m in self.said if m.WhichOneof("kind") == kind]) < count:
                await asyncio.sleep(0.01)
        return found

    def new_session(self, link: FakeLink | None = None) -> None:
        self.link.closed = True
        self.link = link or FakeLink()
        self.said.clear()
        self.apps.new_session()


def site(test: Callable[[Site], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """A test with a site in an event loop."""

    def run(tmp_path: Path) -> None:
        async def within() -> None:
            found = Site(tmp_path)
            try:
                await test(found)
            finally:
                await found.apps.close()

        asyncio.run(within())

    run.__name__ = test.__name__
    return run


@site
async def test_a_reply_is_kept_until_it_is_not_needed_and_handed_in_again_in_the_next_session(
    site: Site,
) -> None:
    site.offer()
    (join,) = await site.says("app_join")
    assert (join.nodes, list(join.ids)) == (1, [])
    site.forget()
    site.order("1")
    site.order("1")
    (reply,) = await site.says("app_reply")
    assert (reply.message.reply_to, reply.message.src) == ("1", NODE)
    site.new_session()
    site.offer()
    (join,) = await site.says("app_join")
    assert list(join.ids) == ["1"]
    await asyncio.sleep(0.1)
    assert not any(m.HasField("app_reply") for m in site.said), "nothing, before it knows what is wanted"
    site.forget()
    (again,) = await site.says("app_reply")
    assert again == reply, "the same, without doing it again"
    site.forget("1")
    site.new_session()
    site.offer()
    assert [list(each.ids) for each in await site.says("app_join")] == [[]]


@site
async def test_what_was_on_its_way_when_the_link_broke_comes_again_and_goes_on(site: Site) -> None:
    data = SMALL + bytes(INLINE_BYTES)
    (header,) = pack({})
    data = bytes(header)  # a content without arrays is as long as it is
    blob = pb.Blob(digest=encode_blob(data).digest, size=len(data))
    site.offer()
    await site.says("app_join")
    site.forget()
    site.link.data, site.link.breaks_after = data, 2
    site.order("1", blob)
    async with asyncio.timeout(10):
        while not site.link.fetches:
            await asyncio.sleep(0.01)
    site.new_session(FakeLink(data))  # while it waits to try again over the old one
    site.offer()
    (join,) = await site.says("app_join")
    assert list(join.ids) == [], "it does not have it"
    site.forget()
    site.order("1", blob)
    site.link.gate.set()
    (reply,) = await site.says("app_reply")
    assert reply.message.reply_to == "1"
    assert site.link.offsets == [2], "behind what had arrived"


@site
async def test_one_content_is_fetched_once_for_all_nodes_messages(site: Site) -> None:
    data = bytes(pack({})[0])
    blob = pb.Blob(digest=encode_blob(data).digest, size=len(data))
    site.link.data = data
    site.link.gate.set()
    site.offer()
    await site.says("app_join")
    site.forget()
    for id in "123":
        site.order(id, blob)
    await site.says("app_reply", count=3)
    assert sum(offset == 0 for offset in site.link.offsets) == 1


@site
async def test_a_message_that_nobody_waits_for_any_more_is_not_answered(site: Site) -> None:
    site.offer()
    await site.says("app_join")
    site.forget()
    site.order("1", pb.Blob(digest=bytes(32), size=1 << 20))
    site.order("2", left_s=0.0)
    await asyncio.sleep(0.05)
    site.forget("1")
    site.order("3")
    (reply,) = await site.says("app_reply")
    assert reply.message.reply_to == "3"


@site
async def test_content_that_is_not_what_was_announced_is_said_to_be_so(site: Site) -> None:
    site.offer()
    await site.says("app_join")
    site.forget()
    site.link.data = b"1234"
    site.link.gate.set()
    site.order("1", pb.Blob(digest=bytes(32), size=4))
    site.order("2", pb.Blob(digest=bytes(32), size=1 << 50))
    replies = {
        each.message.reply_to: each.message.error.reason for each in await site.says("app_reply", count=2)
    }
    assert replies == {
        "1": "the site could not take the message: RemoteProtocolError",
        "2": "the site could not take the message: LimitError",
    }


@site
async def test_an_app_that_is_not_offered_again_is_asked_about_and_ends_when_it_is_over(site: Site) -> None:
    before = taking_part.ASK_S
    taking_part.ASK_S = 0.05  # type: ignore[misc]  # a minute, else
    try:
        site.offer()
        await site.says("app_join")
        site.new_session()
        asked = (await site.says("app_join", count=2))[0]
        assert (asked.run_id, asked.nodes) == ("run", 0)
        site.apps.ended("run")
        await asyncio.sleep(0.2)
        site.said.clear()
        await asyncio.sleep(0.2)
        assert site.said == []
    finally:
        taking_part.ASK_S = before  # type: ignore[misc]


@site
async def test_what_a_coordinator_may_not_send_ends_the_session(site: Site) -> None:
    site.offer()
    await site.says("app_join")
    site.forget()
    about = AppMessage("1", "train", 12345, {}, ttl=1.0)
    with pytest.raises(RemoteProtocolError, match="for a node of this site"):
        site.hear(app_order=pb.AppOrder(run_id="run", message=encode(about), left_s=1.0))
    for at in range(one_run.MAX_ORDERS):
        site.order(str(at), pb.Blob(digest=bytes(32), size=9))
    with pytest.raises(RemoteProtocolError, match="expected at most 256 messages"):
        site.order("one more", pb.Blob(digest=bytes(32), size=9))
    site.hear(app_order=pb.AppOrder(run_id="unknown"))  # of one that has ended meanwhile


@site
async def test_settings_that_no_app_has_are_refused(site: Site) -> None:
    config = encode_values({"x": b"bytes"})
    site.hear(app_offer=pb.AppOffer(run_id="run", app="fedge-tests/unruly", version="1.0.0", config=config))
    (refuse,) = await site.says("refuse")
    assert "RemoteProtocolError" in refuse.refusal.message


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(taking_part, "MAX_APPS", 1)
    return


def test_a_site_takes_part_in_so_many_apps(few: None, tmp_path: Path) -> None:
    async def within() -> None:
        found = Site(tmp_path)
        found.offer("one")
        await found.says("app_join")
        found.offer("two")
        (refuse,) = await found.says("refuse")
        assert refuse.refusal.message == "this site takes part in 1 apps already"
        await found.apps.close()

    asyncio.run(within())
