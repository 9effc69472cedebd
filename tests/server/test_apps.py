"""A coordinator's Flower apps: who is told what, and what their processes and sites may not say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import BusyError, ConfigError, LimitError, RemoteProtocolError, RunError, StorageError
from fedge.records import AppMessage, ErrorCode, node_id
from fedge.wire import fedge_pb2 as pb
from fedge.wire import records
from fedge.wire.codec import encode_blob
from fedge.wire.limits import INLINE_BYTES, Limits
from fedge_server.apps import app_run, switchboard
from fedge_server.apps.app_run import AppRun
from fedge_server.apps.conversation import Conversation, Request
from fedge_server.apps.switchboard import Switchboard
from fedge_server.spool import Spool

OFFER = pb.AppOffer(app="team/app", version="1.0.0")
NODE = node_id("a", 0)
PAYLOAD = b"".join(bytes(part) for part in records.pack({}))


class Board:
    """A switchboard, and all that sites were sent."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[tuple[str, pb.ServerMessage]] = []
        self.apps = Switchboard(
            Spool(folder),
            lambda site, message: self.sent.append((site, message)),
            most=2,
            is_run=lambda run_id: run_id == "real-00000000",
        )

    def told(self, kind: str) -> list[tuple[str, Any]]:
        """What sites were sent of one kind, since it was last asked."""
        found = [(site, getattr(m, kind)) for site, m in self.sent if m.WhichOneof("kind") == kind]
        self.sent.clear()
        return found

    def opened(self, *, run_id: str = "", waiting: tuple[str, ...] = ()) -> AppRun:
        run = self.apps.open(pb.AppOpen(run_id=run_id, offer=OFFER, waiting=waiting), admin="admin")
        run.attach(self, waiting)
        return run

    def join(self, run: AppRun, site: str = "a", *ids: str) -> None:
        self.apps.join(site, pb.AppJoin(run_id=run.run_id, nodes=1, ids=ids))


def asked(id: str, *, node: int = NODE, ttl: float = 100.0) -> pb.AppMessage:
    return records.encode(AppMessage(id, "train", node, {}, ttl=ttl))


def replied(run: AppRun, id: str) -> pb.AppReply:
    about = AppMessage(f"{id}/reply", "train", 1, {}, reply_to=id)
    return pb.AppReply(run_id=run.run_id, message=records.encode(about, encode_blob(PAYLOAD)))


def later(run: AppRun, seconds: float) -> None:
    now = run._clock() + seconds
    run._clock = lambda: now


async def events_of(run: AppRun, whose: object, count: int) -> list[Any]:
    events = run.events(whose)
    return [await asyncio.wait_for(anext(events), 10) for _ in range(count)]


def board(test: Callable[[Board], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """A test with a switchboard in an event loop."""

    def run(tmp_path: Path) -> None:
        async def within() -> None:
            found = Board(tmp_path)
            try:
                await test(found)
            finally:
                found.apps.shut_down()

        asyncio.run(within())

    run.__name__ = test.__name__
    return run


@board
async def test_a_message_goes_to_its_site_and_its_reply_to_the_process(board: Board) -> None:
    run = board.opened()
    board.join(run)
    run.send([asked("1")], encode_blob(PAYLOAD), None)
    (site, order) = board.told("app_order")[-1]
    assert (site, order.message.id, order.message.content.inline) == ("a", "1", PAYLOAD)
    assert 99 < order.left_s <= 100
    board.apps.inline("a", replied(run, "1"))
    nodes, reply = await events_of(run, board, 2)
    assert list(nodes.nodes.ids) == [NODE]
    assert (reply.reply.reply_to, reply.reply.content.inline) == ("1", PAYLOAD)
    run.forget(["1"])
    assert [(site, list(ids.ids)) for site, ids in board.told("app_forget")] == [("a", ["1"])]


@board
async def test_a_process_that_comes_back_is_given_the_replies_that_it_waits_for_and_no_others(
    board: Board,
) -> None:
    run = board.opened()
    board.join(run)
    run.send([asked("1"), asked("2"), asked("3")], encode_blob(PAYLOAD), None)
    for id in "12":
        board.apps.inline("a", replied(run, id))
    await events_of(run, board, 3)  # and its link breaks, before it has said that they are there
    board.told("app_forget")
    assert board.opened(run_id=run.run_id, waiting=("2", "3")) is run
    assert [list(ids.ids) for _, ids in board.told("app_forget")] == [["1"]]
    _, reply = await events_of(run, board, 2)
    assert reply.reply.reply_to == "2"


@board
async def test_a_reply_that_is_early_is_not_called_unwanted(board: Board) -> None:
    """The site's session is up and its join is on its way, after the coordinator was started again."""
    run = board.opened(run_id="app-00000000", waiting=("1",))
    run.send([asked("1")], encode_blob(PAYLOAD), None)
    board.apps.inline("a", replied(run, "1"))
    assert board.told("app_forget") == []
    board.join(run, "a", "1")
    assert [list(ids.ids) for _, ids in board.told("app_forget")] == [[]]
    board.apps.inline("a", replied(run, "1"))
    assert run.exchange.unanswered == 0


@board
async def test_an_app_that_was_ended_does_not_come_back(board: Board) -> None:
    run = board.opened()
    board.join(run)
    board.apps.end(run, "stopped", "stopped by admin x")
    board.apps.end(run, "failed", "again")
    assert [(site, ended.status) for site, ended in board.told("ended")] == [("a", "stopped")]
    with pytest.raises(RunError, match="was ended: stopped by admin x"):
        board.opened(run_id=run.run_id)
    with pytest.raises(RunError, match="was ended: stopped by admin x"):
        await events_of(run, board, 2)


@board
async def test_a_site_that_was_away_hears_that_an_app_has_ended_when_it_asks(board: Board) -> None:
    run = board.opened()
    board.apps.end(run, "done", "")
    board.apps.join("a", pb.AppJoin(run_id=run.run_id))
    assert [(site, ended.run_id) for site, ended in board.told("ended")] == [("a", run.run_id)]
    board.apps.join("a", pb.AppJoin(run_id="app-00000001"))
    assert board.told("ended") == [], "its process may still come back"
    board.apps._began -= app_run.LINGER_S
    board.apps.join("a", pb.AppJoin(run_id="app-00000001"))
    assert len(board.told("ended")) == 1
    other = board.opened()
    board.apps.join("a", pb.AppJoin(run_id=other.run_id))
    assert other.exchange.sites == [], "to ask is not to join"


@board
async def test_only_so_many_apps_run_but_those_that_come_back_have_their_places(board: Board) -> None:
    board.opened()
    board.opened()
    with pytest.raises(RunError, match="has its 2 open apps; stop one first"):
        board.opened()
    board.opened(run_id="app-00000000")


@pytest.mark.parametrize(
    ("open", "says"),
    [
        (pb.AppOpen(offer=pb.AppOffer(app="noslash", version="1")), "expected an app's publisher/name"),
        (pb.AppOpen(offer=pb.AppOffer(app="a/b")), "expected an app's publisher/name and version"),
        (pb.AppOpen(run_id="../x", offer=OFFER), "expected the id of an app's run"),
        (pb.AppOpen(run_id="real-00000000", offer=OFFER), "expected the id of an app's run"),
    ],
    ids=["a name", "a version", "an id", "the id of a run"],
)
def test_an_app_that_cannot_be_is_refused(open: pb.AppOpen, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        Board(tmp_path).apps.open(open, admin="admin")


def test_settings_are_numbers_texts_and_truth_values(tmp_path: Path) -> None:
    offer = pb.AppOffer(app="a/b", version="1", config=records.encode_values({"x": b"bytes"}))
    with pytest.raises(RemoteProtocolError, match="found a bytes for 'x'"):
        Board(tmp_path).apps.open(pb.AppOpen(offer=offer), admin="admin")


@board
async def test_another_admins_app_is_not_gone_on_with(board: Board) -> None:
    run = board.opened()
    with pytest.raises(RunError, match="another admin's"):
        board.apps.open(pb.AppOpen(run_id=run.run_id, offer=OFFER), admin="other")


@board
async def test_what_a_site_says_when_it_joins_has_limits(board: Board) -> None:
    run = board.opened()
    for joined, says in (
        (pb.AppJoin(run_id=run.run_id, nodes=1025), "expected 1 to 1024 nodes"),
        (pb.AppJoin(run_id=run.run_id, nodes=1, ids=["x"] * 4097), "at most 4096 ids"),
        (pb.AppJoin(run_id=run.run_id, nodes=1, ids=["x" * 300]), "or long ones"),
        (pb.AppJoin(run_id="x" * 300, nodes=1), "an id of a run"),
    ):
        with pytest.raises(LimitError, match=says):
            board.apps.join("a", joined)
    board.join(run)
    with pytest.raises(RemoteProtocolError, match="once in a session"):
        board.join(run)
    board.apps.disconnect("a")
    board.join(run)


@board
async def test_replies_that_are_none_are_refused(board: Board) -> None:
    run = board.opened()
    board.join(run)
    run.send([asked("1")], encode_blob(PAYLOAD), None)
    content = pb.Blob(digest=bytes(32), size=4, inline=b"1234")
    for message, says in (
        (pb.AppMessage(reply_to="1"), "expected a reply with content or an error"),
        (pb.AppMessage(reply_to="1", content=pb.Blob(size=4)), "with its content in it"),
        (pb.AppMessage(reply_to="1", content=content), "of the claimed size and digest"),
        (
            pb.AppMessage(reply_to="1", content=encode_blob(bytes(INLINE_BYTES + 1), inline_bytes=1 << 20)),
            "65536",
        ),
    ):
        with pytest.raises(RemoteProtocolError, match=says):
            board.apps.inline("a", pb.AppReply(run_id=run.run_id, message=message))
    board.apps.inline("a", pb.AppReply(run_id="unknown", message=pb.AppMessage()))
    assert run.exchange.unanswered == 1


@board
async def test_a_message_to_a_site_that_is_gone_or_whose_time_is_over_has_an_error_for_a_reply(
    board: Board,
) -> None:
    run = board.opened()
    board.join(run)
    run.send([asked("1", ttl=0.0), asked("2"), asked("3", node=5)], encode_blob(PAYLOAD), None)
    board.told("app_order")
    run.look()
    assert [list(ids.ids) for _, ids in board.told("app_forget")] == [["1"]]
    _, reply = await events_of(run, board, 2)
    assert (reply.reply.reply_to, reply.reply.error.code) == ("1", ErrorCode.MESSAGE_UNAVAILABLE)
    run.leave("a")
    later(run, 61.0)
    run.look()
    _, *replies = await events_of(run, board, 3)
    assert [(each.reply.reply_to, each.reply.error.code) for each in replies] == [
        ("2", ErrorCode.NODE_UNAVAILABLE),
        ("3", ErrorCode.NODE_UNAVAILABLE),
    ]


@board
async def test_an_app_whose_process_does_not_come_back_ends(board: Board) -> None:
    run = board.opened()
    board.join(run)
    run.detach(board)
    assert not run.deserted
    later(run, app_run.LINGER_S)
    assert run.deserted
    board.apps.connect("b")
    for _ in range(200):
        if not board.apps.runs:
            break
        await asyncio.sleep(0.05)
    assert ("a", "failed") in [(site, ended.status) for site, ended in board.told("ended")]


@board
async def test_a_stored_reply_that_cannot_be_read_back_becomes_an_error(board: Board) -> None:
    run = board.opened()
    board.join(run)
    data = bytes(INLINE_BYTES + 1)
    run.send([asked("1")], encode_blob(PAYLOAD), None)
    stored = board.apps.spool.upload(size=len(data), digest=encode_blob(data).digest, masked=True)
    stored.write(data)
    reply = replied(run, "1")
    reply.message.content.CopyFrom(encode_blob(data))
    board.apps.stored("a", reply, stored)
    assert board.apps.kept_bytes == len(data)

    def broken(*_: int) -> bytes:
        raise StorageError("the disk is gone")

    stored.read = broken  # type: ignore[method-assign]
    with pytest.raises(BusyError):
        await events_of(run, board, 3)
    board.opened(run_id=run.run_id, waiting=("1",))
    _, error = await events_of(run, board, 2)
    assert "has lost the reply" in error.reply.error.reason


@board
async def test_one_content_to_many_nodes_is_here_once(board: Board) -> None:
    run = board.opened()
    content = encode_blob(bytes(INLINE_BYTES))
    run.send([asked(str(at), node=at) for at in range(1000)], content, None)
    letters = [sent.what for sent in run.exchange._sent.values()]
    assert all(letter is not None and letter.content is content for letter in letters)


@board
async def test_an_app_has_so_many_messages_at_once(board: Board) -> None:
    run = board.opened()
    many = [asked(str(at), node=5) for at in range(app_run.MAX_MESSAGES + 1)]
    with pytest.raises(LimitError, match="expected at most 100000 messages"):
        run.send(many, encode_blob(PAYLOAD), None)


async def said(*requests: Request) -> AsyncIterator[Request]:
    for each in requests:
        yield each
    await asyncio.sleep(60)


OPEN = pb.AppRequest(open=pb.AppOpen(offer=OFFER))
LARGE = bytes(INLINE_BYTES + 1)


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([b"x"], "expected an app first, found data"),
        ([OPEN, OPEN], "expected messages, or which are over, found open"),
        ([OPEN, b"x"], "found data"),
        ([None], "expected an app first, found what cannot be read"),
        ([OPEN, None], "found what cannot be read"),
        (
            [OPEN, pb.AppRequest(send=pb.AppSend(content=encode_blob(LARGE))), OPEN],
            "expected 65537 more bytes of content, found something else",
        ),
        (
            [
                OPEN,
                pb.AppRequest(send=pb.AppSend(content=encode_blob(LARGE))),
                LARGE + b"x",
            ],
            "expected 65537 bytes, found at least 65538",
        ),
        (
            [
                OPEN,
                pb.AppRequest(send=pb.AppSend(content=encode_blob(LARGE))),
                b"x" * 65537,
            ],
            "expected the announced digest",
        ),
        (
            [OPEN, pb.AppRequest(send=pb.AppSend(content=encode_blob(LARGE, inline_bytes=1 << 20)))],
            "content in one message of at most 65536 bytes",
        ),
        ([OPEN, pb.AppRequest(send=pb.AppSend(content=pb.Blob(size=1 << 50)))], "a vector of at most"),
    ],
    ids=[
        "no app",
        "two",
        "bytes",
        "noise",
        "noise later",
        "no bytes",
        "too many",
        "others",
        "inline",
        "huge",
    ],
)
def test_a_process_that_says_what_it_may_not_is_told_so(
    requests: list[Request], says: str, tmp_path: Path
) -> None:
    async def within() -> None:
        found = Board(tmp_path)
        conversation = Conversation(found.apps, said(*requests), Limits(), admin="admin")
        with pytest.raises(RemoteProtocolError, match=says):
            async for _ in conversation.run(list):
                pass
        found.apps.shut_down()

    asyncio.run(within())


@board
async def test_a_site_that_comes_while_an_app_is_opened_is_offered_it(board: Board) -> None:
    requests: asyncio.Queue[Request] = asyncio.Queue()
    sessions = ["a"]

    async def slowly() -> AsyncIterator[Request]:
        while True:
            yield await requests.get()

    conversation = Conversation(board.apps, slowly(), Limits(), admin="admin")
    events = conversation.run(lambda: list(sessions))
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.01)
    sessions.append("b")
    board.apps.connect("b")
    requests.put_nowait(OPEN)
    await asyncio.sleep(0.05)
    assert {site for site, _ in board.told("app_offer")} == {"a", "b"}
    first.cancel()


def test_ids_of_ended_apps_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchboard, "_MAX_ENDED", 3)

    async def within() -> None:
        found = Board(tmp_path)
        for _ in range(5):
            found.apps.end(found.opened(), "done", "")
        assert len(found.apps._ended) == 3
        found.apps.shut_down()

    asyncio.run(within())
