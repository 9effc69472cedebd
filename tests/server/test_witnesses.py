"""What sites have the coordinator keep: the newest of each, behind their messages, across restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge.errors import RemoteProtocolError, StorageError
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry
from fedge_server.witnesses import MAX_BYTES, Witnesses


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    database = Database(f"sqlite:///{tmp_path / 'fedge.db'}")
    database.open()
    yield Registry(database)
    database.close()


def test_the_newest_of_each_site_is_there_after_a_restart(registry: Registry):
    async def scenario() -> None:
        first = Witnesses(registry)
        assert await first.of("a") == b""
        for number in range(100):
            first.remember("a", b"a%d" % number)
            first.remember("b", b"b%d" % number)
        assert await first.of("a") == b"a99", "at once, whatever is written yet"
        await asyncio.sleep(0)
        first.close()
        second = Witnesses(registry)
        assert [await second.of(site) for site in "abc"] == [b"a99", b"b99", b""]
        second.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("sealed", [b"", b"x" * (MAX_BYTES + 1)])
def test_what_cannot_be_a_witness_is_refused(registry: Registry, sealed: bytes):
    async def scenario() -> None:
        witnesses = Witnesses(registry)
        with pytest.raises(RemoteProtocolError, match="expected a witness of 1 to"):
            witnesses.remember("a", sealed)
        assert await witnesses.of("a") == b""
        witnesses.close()

    asyncio.run(scenario())


def test_a_disk_that_fails_costs_one_and_not_the_next(registry: Registry, monkeypatch, caplog):
    async def scenario() -> None:
        witnesses, keep = Witnesses(registry), registry.keep_witnesses
        monkeypatch.setattr(registry, "keep_witnesses", fails)
        witnesses.remember("a", b"1")
        while "witnesses_not_kept" not in caplog.text:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(registry, "keep_witnesses", keep)
        while witnesses._writing:
            await asyncio.sleep(0.01)
        witnesses.remember("a", b"2")
        while witnesses._writing:
            await asyncio.sleep(0.01)
        witnesses.close()
        assert registry.witness("a") == b"2"

    def fails(_: object) -> None:
        raise StorageError("full")

    asyncio.run(asyncio.wait_for(scenario(), 10))
