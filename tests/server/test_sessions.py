"""A site's session: messages in order, a bound on how many wait, and an end that nobody waits for in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime

from fedge.principal import Principal
from fedge.wire import fedge_pb2 as pb
from fedge_server.sessions import BATCH_BYTES, MAX_QUEUED_MESSAGES, Session

DAY = datetime(2026, 1, 1, tzinfo=UTC)


def session(site: str = "north") -> Session:
    return Session(Principal("f" * 32, "site", site, 1, DAY, DAY))


def message(number: int) -> pb.ServerMessage:
    return pb.ServerMessage(ended=pb.Ended(run_id=str(number)))


def numbers(messages: list[pb.ServerMessage]) -> list[int]:
    return [int(each.ended.run_id) for each in messages if each.WhichOneof("kind") == "ended"]


def reasons(messages: list[pb.ServerMessage]) -> list[str]:
    return [each.closing.reason for each in messages if each.WhichOneof("kind") == "closing"]


async def read_all(link: Session, into: list[pb.ServerMessage]) -> None:
    async for each in link.outgoing():
        into.extend(each)  # what is read by now is looked at meanwhile


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_messages_come_out_in_the_order_they_were_sent_before_and_while_somebody_reads():
    async def scenario() -> None:
        link, read = session(), list[pb.ServerMessage]()
        for number in range(3):
            link.send(message(number))
        reader = asyncio.create_task(read_all(link, read))
        await settle()
        assert numbers(read) == [0, 1, 2]
        for number in range(3, 6):
            link.send(message(number))
            if number == 4:
                await settle()
        await settle()
        assert numbers(read) == list(range(6))
        assert not reader.done()
        link.close("done")
        await reader

    run(scenario())


def test_what_was_queued_when_the_session_closes_is_still_sent_and_nothing_after():
    async def scenario() -> None:
        link, read = session(), list[pb.ServerMessage]()
        link.send(message(0))
        link.close("first")
        link.close("second")
        link.send(message(1))
        await read_all(link, read)
        assert numbers(read) == [0]
        assert (link.closed, link.ended_because) == (True, "first")
        assert reasons(read) == ["first"]

    run(scenario())


def test_closing_ends_a_reader_that_waits():
    async def scenario() -> None:
        link, read = session(), list[pb.ServerMessage]()
        reader = asyncio.create_task(read_all(link, read))
        await settle()
        link.close("enough")
        await reader
        assert reasons(read) == ["enough"]

    run(scenario())


def test_a_message_and_the_close_behind_it_both_arrive():
    async def scenario() -> None:
        link, read = session(), list[pb.ServerMessage]()
        reader = asyncio.create_task(read_all(link, read))
        await settle()
        link.send(message(0))
        link.send(message(1))
        link.close("enough")
        await reader
        assert numbers(read) == [0, 1]

    run(scenario())


def test_a_reader_that_lags_too_far_behind_is_cut_off_and_nobody_waits_for_it():
    async def scenario() -> None:
        link, read = session(), list[pb.ServerMessage]()
        for number in range(MAX_QUEUED_MESSAGES):
            link.send(message(number))
        assert not link.closed
        link.send(message(-1))
        assert link.closed
        assert "1024 messages were waiting" in link.ended_because
        await read_all(link, read)
        assert numbers(read) == list(range(MAX_QUEUED_MESSAGES))

    run(scenario())


def test_a_reader_that_is_cancelled_leaves_no_task_behind():
    async def scenario() -> None:
        link, before = session(), asyncio.all_tasks()
        reader = asyncio.create_task(read_all(link, []))
        await settle()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await settle()
        assert asyncio.all_tasks() == before

    run(scenario())


def test_two_sessions_of_one_site_are_told_apart():
    async def scenario() -> None:
        one, two = session(), session()
        assert one.site == two.site == "north"
        assert one.number < two.number

    run(scenario())


def test_a_lazy_message_rides_with_the_next_one_or_follows_by_itself():
    async def scenario() -> None:
        link = session()
        batches: list[list[int]] = []

        async def read() -> None:
            async for batch in link.outgoing():
                batches.append(numbers(batch))

        reader = asyncio.create_task(read())
        await settle()
        link.send(message(0), lazily=True)
        await settle()
        assert batches == []
        link.send(message(1))
        await settle()
        assert batches == [[0, 1]]
        link.send(message(2), lazily=True)
        while len(batches) < 2:
            await asyncio.sleep(0.001)
        assert batches == [[0, 1], [2]]
        link.close("done")
        await reader

    run(scenario())


def test_messages_that_are_large_together_are_sent_apart():
    async def scenario() -> None:
        link = session()
        offer = pb.ServerMessage(offer=pb.Offer(run_id="x" * (BATCH_BYTES - 100)))
        for _ in range(3):
            link.send(offer)
        link.close("done")
        sizes = [len(batch) async for batch in link.outgoing()]
        assert sizes == [1, 1, 2]  # the last with the close behind it

    run(scenario())
