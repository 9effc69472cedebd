"""Uploads that break off and go on: what has arrived counts once, whoever brings it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import BusyError, LinkError, RefusedError
from fedge.events import OrderId
from fedge.vector import bytes_of, digest_of
from fedge.wire.limits import INLINE_BYTES
from fedge_server.limits import Bucket, Concurrency, Pace
from fedge_server.spool import Spool, Upload
from fedge_server.uploads import FORGOTTEN_S, Incoming, Uploads

VECTOR = np.arange(INLINE_BYTES, dtype=np.float32)  # four chunks of a quarter
DATA = bytes(bytes_of(VECTOR))
PART = len(DATA) // 4
DIGEST = digest_of(DATA)
ORDER = OrderId("train", 1)

Play = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "spool").mkdir()
    return Uploads(Spool(tmp_path / "spool"), max_idle_bytes=3 * len(DATA))


async def send(
    uploads: Uploads,
    *parts: int,
    site: str = "a",
    order: OrderId = ORDER,
    offset: int = 0,
    digest: bytes = DIGEST,
    breaks: bool = False,
) -> Upload:
    """A call that brings these quarters and ends, or breaks."""
    with uploads.receiving(site, "run", order, size=len(DATA), digest=digest, offset=offset) as incoming:
        await feed(incoming, *parts)
        if breaks:
            raise LinkError("broken")
        incoming.upload.finish()
    return incoming.upload


async def feed(incoming: Incoming, *parts: int) -> None:
    for part in parts:
        await incoming.write(DATA[part * PART : (part + 1) * PART])
    await incoming.settle()


def test_what_broke_off_goes_on_where_it_was(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        for parts in ((0,), (1, 2)):
            offset = await uploads.resume("a", "run", ORDER, DIGEST)
            assert offset == parts[0] * PART
            with pytest.raises(LinkError):
                await send(uploads, *parts, offset=offset, breaks=True)
        upload = await send(uploads, 3, offset=await uploads.resume("a", "run", ORDER, DIGEST))
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)
        assert await uploads.resume("a", "run", ORDER, DIGEST) == 0, "it is the run's now"
        assert not upload.closed

    play(scenario())


class SlowDisk:
    """Chunks are written when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.begun = threading.Event(), threading.Event()
        write = Upload.write

        def slowly(upload: Upload, data: bytes) -> None:
            self.begun.set()
            assert self.go_on.wait(20)
            write(upload, data)

        monkeypatch.setattr(Upload, "write", slowly)
        monkeypatch.setattr("fedge_server.uploads._ON_LOOP_BYTES", 0)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_a_chunk_that_is_being_written_when_its_call_is_cancelled_counts_once(
    uploads: Uploads, play: Play, slow_disk: SlowDisk
) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(send(uploads, 0, breaks=True))
        await asyncio.to_thread(slow_disk.begun.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        asking = asyncio.create_task(uploads.resume("a", "run", ORDER, DIGEST))
        await asyncio.sleep(0)
        slow_disk.go_on.set()
        assert await asking == PART
        upload = await send(uploads, 1, 2, 3, offset=PART)
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)

    play(scenario())


def test_a_call_that_is_stopped_at_its_last_chunk_does_not_hand_the_upload_in_as_well(
    uploads: Uploads, play: Play, slow_disk: SlowDisk
) -> None:
    async def scenario() -> None:
        slow_disk.go_on.set()
        with pytest.raises(LinkError):
            await send(uploads, 0, 1, 2, breaks=True)
        slow_disk.go_on.clear()
        slow_disk.begun.clear()
        offset = await uploads.resume("a", "run", ORDER, DIGEST)
        dead = asyncio.create_task(send(uploads, 3, offset=offset))
        await asyncio.to_thread(slow_disk.begun.wait, 20)
        asking = asyncio.create_task(uploads.resume("a", "run", ORDER, DIGEST))
        await asyncio.sleep(0)
        slow_disk.go_on.set()
        assert await asking == len(DATA)
        with pytest.raises(LinkError, match="another call"):
            await dead
        upload = await send(uploads, offset=len(DATA))
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)

    play(scenario())


def test_what_had_arrived_whole_before_its_call_broke_is_not_sent_again(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        with pytest.raises(LinkError):
            await send(uploads, 0, 1, 2, 3, breaks=True)
        assert await uploads.resume("a", "run", ORDER, DIGEST) == len(DATA)
        upload = await send(uploads, offset=len(DATA))
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)

    play(scenario())


def test_a_call_whose_link_is_dead_and_does_not_know_is_stopped_by_the_one_that_goes_on(
    uploads: Uploads, play: Play
) -> None:
    async def scenario() -> None:
        async def dead_call() -> None:
            room = uploads.receiving("a", "run", ORDER, size=len(DATA), digest=DIGEST, offset=0)
            with room as incoming:
                await feed(incoming, 0, 1)
                reached.set()
                await over.wait()
                await feed(incoming, 2)  # what was on its way over the dead link

        reached, over = asyncio.Event(), asyncio.Event()
        dead = asyncio.create_task(dead_call())
        await reached.wait()
        assert await uploads.resume("a", "run", ORDER, DIGEST) == 2 * PART
        upload = await send(uploads, 2, 3, offset=2 * PART)
        over.set()
        with pytest.raises(LinkError, match="another call"):
            await dead
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)

    play(scenario())


def test_bytes_from_elsewhere_than_where_it_broke_off_are_refused(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        with pytest.raises(LinkError):
            await send(uploads, 0, breaks=True)
        with pytest.raises(BusyError, match="ask again"):
            await send(uploads, 2, 3, offset=2 * PART)
        with pytest.raises(BusyError, match="ask again"):
            await send(uploads, 1, site="b", offset=PART)
        assert await uploads.resume("a", "run", ORDER, DIGEST) == PART, "what is here stays"

    play(scenario())


def test_an_update_with_other_bytes_begins_anew(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        with pytest.raises(LinkError):
            await send(uploads, 0, breaks=True)
        assert await uploads.resume("a", "run", ORDER, b"x" * 32) == 0
        with pytest.raises(BusyError):
            await send(uploads, 1, offset=PART, digest=b"x" * 32)
        upload = await send(uploads, 0, 1, 2, 3)
        np.testing.assert_array_equal(upload[0 : len(VECTOR)], VECTOR)

    play(scenario())


def test_what_is_refused_is_not_kept(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        with pytest.raises(RefusedError, match="digest"):
            await send(uploads, 0, 1, 2, 2)
        with (
            pytest.raises(RefusedError, match="finite"),
            uploads.receiving("a", "run", ORDER, size=len(DATA), digest=DIGEST, offset=0) as incoming,
        ):
            await incoming.write(np.full(4, np.nan, np.float32).tobytes())
        assert await uploads.resume("a", "run", ORDER, DIGEST) == 0

    play(scenario())


def test_parts_take_bounded_room_and_the_oldest_goes_first(uploads: Uploads, play: Play) -> None:
    async def scenario() -> None:
        for site in "abcd":
            with pytest.raises(LinkError):
                await send(uploads, 0, site=site, breaks=True)
        received = [await uploads.resume(site, "run", ORDER, DIGEST) for site in "abcd"]
        assert received == [0, PART, PART, PART]
        uploads.forget_run("run")
        assert await uploads.resume("d", "run", ORDER, DIGEST) == 0

    play(scenario())


def test_a_part_is_forgotten_after_an_hour(
    uploads: Uploads, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with pytest.raises(LinkError):
            await send(uploads, 0, breaks=True)
        loop = asyncio.get_running_loop()
        later = loop.time() + FORGOTTEN_S + 1
        monkeypatch.setattr(loop, "time", lambda: later)
        with pytest.raises(LinkError):
            await send(uploads, 0, site="b", breaks=True)
        assert await uploads.resume("a", "run", ORDER, DIGEST) == 0
        monkeypatch.undo()

    play(scenario())


# Limits.


def test_a_bucket_lets_through_its_burst_at_once_and_its_rate_on_average() -> None:
    bucket = Bucket(10.0, burst=20.0)
    assert bucket.take(20, now=0.0) == 0.0
    assert bucket.take(10, now=0.0) == 1.0
    assert bucket.take(10, now=1.0) == 1.0
    assert bucket.take(5, now=1000.0) == 0.0
    assert Bucket(0.0, burst=0.0).take(1e12, now=0.0) == 0.0


def test_sites_that_come_at_once_are_given_moments_of_their_own_to_come_back() -> None:
    pace = Pace(after_s=1.0, rate=100.0)
    told = []
    for _ in range(10_000):
        try:
            pace.admit(now=5.0)
        except BusyError as error:
            told.append(error.retry_after_s)
    assert len(told) == 10_000 - 100
    assert told == sorted(told)
    busiest = max(sum(1 for each in told if second <= each < second + 1) for second in range(101))
    assert busiest <= 101
    assert told[-1] <= 102
    pace.admit(now=7.0)


def test_so_many_at_once_and_no_more_for_each_and_in_all() -> None:
    limit = Concurrency("uploads", each=2, in_all=3)
    with limit.one_of("a"), limit.one_of("a"):
        with pytest.raises(BusyError, match="2 uploads of one site"), limit.one_of("a"):
            pass
        with limit.one_of("b"), pytest.raises(BusyError, match="3 uploads at once"), limit.one_of("c"):
            pass
        with limit.one_of("c"):
            pass
    with limit.one_of("a"):
        pass
