"""Sites without training, many in one process: what C1 to C4 connect to a real coordinator.

    python -m benchmarks.tasks.light IDENTITIES HOST:PORT --first N --count N
        [--work-s LOW HIGH] [--first-slower FACTOR] [--hold FILE] [--cuts FOLDER --cuts-a-round N]

Each is a task on one event loop with its own channel and its own certificate (IDENTITIES is light.py's), and
speaks the session protocol over the client's own `Link`: it accepts every run and answers each order, after
a random time, with a finite update of the right size. It is no agent: no gate, no worker, no outbox.

A large update waits, the model fetched, until FILE exists. With FOLDER, so many sites of each round lose
their connection in the middle of their work, as by a kill -9, and come back a second after. What is worth
knowing is printed, a line each, the site's name last: `holding`, `cut`, `failed`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedge.errors import BusyError, FedgeError
from fedge.vector import Array, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_layout
from fedge.wire.limits import INLINE_BYTES
from fedge_client.agent import backoff_s
from fedge_client.download import Download
from fedge_client.link import Link, SessionCall

AWAY_S = 1.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Habits:
    """How the sites of a process answer: see the module."""

    work_s: tuple[float, float] = (0.0, 0.0)
    slower: dict[str, float] = field(default_factory=dict)
    """By site, how many times longer its work takes."""
    may_deliver: asyncio.Event | None = None
    cuts: Path | None = None
    cuts_a_round: int = 0

    def cut_in(self, round: int) -> bool:
        """Whether the caller is one of those that lose their link in this round; the first to ask are."""
        if self.cuts is None:
            return False
        for number in range(self.cuts_a_round):
            try:
                (self.cuts / f"{round}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


class Site:
    """One site's part, for ever."""

    def __init__(self, name: str, address: str, pem: dict[str, bytes], habits: Habits) -> None:
        self.name = name
        self._address = address
        self._pem = pem
        self._habits = habits
        self._updates: dict[str, tuple[Array, bytes]] = {}
        """By run, the vector of every update, and its digest."""
        self._answering: asyncio.Task[None] | None = None
        self._order = pb.Order()
        self._writing = asyncio.Lock()
        self._back_in_s = 0.0
        self._cut = False

    async def stay(self) -> None:
        """Open a session, again and again, waiting in between as an agent does."""
        failures, down_since = 0, time.monotonic()
        while True:
            self._back_in_s, self._cut = 0.0, False
            link = Link(self._address, **self._pem)  # type: ignore[arg-type]  # only those that are PEM
            try:
                call, _ = await link.open_session()
                failures = -1  # of those that come after this session
                await self._session(link, call)
            except BusyError as error:
                self._back_in_s = error.retry_after_s
            except FedgeError:  # the coordinator is away, or this site's link was cut
                pass
            finally:
                self._drop_answer()
                await link.close()
            if failures < 0:
                failures, down_since = 0, time.monotonic()
            longest = backoff_s(failures, down_s=time.monotonic() - down_since)
            failures += 1
            if self._cut:
                await asyncio.sleep(AWAY_S)
            else:
                await asyncio.sleep(self._back_in_s * random.uniform(1, 1.1) or random.uniform(0, longest))

    async def _session(self, link: Link, call: SessionCall) -> None:
        async for message in link.read(call):
            match message.WhichOneof("kind"):
                case "offer":
                    run_id, size = message.offer.run_id, decode_layout(message.offer.layout).size
                    vector = np.full(size, 1e-3, np.float32)
                    self._updates[run_id] = vector, digest_of(vector)
                    await self._write(link, call, pb.ClientMessage(accept=pb.Accept(run_id=run_id)))
                case "order":
                    self._drop_answer()
                    self._order = message.order
                    self._answering = asyncio.create_task(self._answer(link, call, message.order))
                case "cancel":
                    if (message.cancel.run_id, message.cancel.id) == (self._order.run_id, self._order.id):
                        self._drop_answer()
                case "closing":
                    self._back_in_s = message.closing.retry_after_s

    def _drop_answer(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            self._answering = None

    async def _answer(self, link: Link, call: SessionCall, order: pb.Order) -> None:
        work_s = random.uniform(*self._habits.work_s) * self._habits.slower.get(self.name, 1.0)
        if self._habits.cut_in(order.id.round):
            await asyncio.sleep(random.uniform(0, self._habits.work_s[0]))  # nobody has answered yet
            print("cut", self.name, flush=True)
            self._cut = True
            await link.close()
            return
        await asyncio.sleep(work_s)
        try:
            await self._hand_in(link, call, order)
        except FedgeError as error:
            print("failed", error, self.name, flush=True)

    async def _hand_in(self, link: Link, call: SessionCall, order: pb.Order) -> None:
        vector, digest = self._updates[order.run_id]
        if order.id.kind == pb.KIND_EVALUATE:
            vector, digest = vector[:0], digest_of(vector[:0])
        inline = vector.tobytes() if vector.nbytes <= INLINE_BYTES else None
        blob = pb.Blob(digest=digest, size=vector.nbytes, inline=inline)
        update = pb.Update(run_id=order.run_id, id=order.id, num_examples=10, vector=blob)
        if inline is not None:
            await self._write(link, call, pb.ClientMessage(update=update))
            return
        await link.fetch(order.run_id, Download(order.model, np.empty_like(vector)))
        if self._habits.may_deliver is not None:
            print("holding", self.name, flush=True)
            await self._habits.may_deliver.wait()
        receipt = await link.deliver(update, vector)
        if receipt.HasField("refusal"):
            print("failed", receipt.refusal.message, self.name, flush=True)

    async def _write(self, link: Link, call: SessionCall, message: pb.ClientMessage) -> None:
        async with self._writing:  # gRPC takes one message after the other
            await link.write(call, message)


async def take_part(given: argparse.Namespace) -> None:
    """Be all of the sites until this process is ended."""
    known = json.loads(given.identities.read_text())
    common = {"ca_pem": known["ca"].encode(), "key_pem": known["key"].encode()}
    may_deliver = asyncio.Event() if given.hold is not None else None
    slower = {next(iter(known["certificates"])): given.first_slower}
    habits = Habits(tuple(given.work_s), slower, may_deliver, given.cuts, given.cuts_a_round)
    names = list(known["certificates"])[given.first : given.first + given.count]
    async with asyncio.TaskGroup() as group:
        for name in names:
            pem = common | {"certificate_pem": known["certificates"][name].encode()}
            group.create_task(Site(name, given.address, pem, habits).stay())
        if may_deliver is not None:
            while not given.hold.exists():  # noqa: ASYNC110  # a file has no event
                await asyncio.sleep(_POLL_S)
            may_deliver.set()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("identities", type=Path)
    parser.add_argument("address")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--work-s", type=float, nargs=2, default=(0.0, 0.0))
    parser.add_argument("--first-slower", type=float, default=1.0)
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--cuts", type=Path)
    parser.add_argument("--cuts-a-round", type=int, default=0)
    asyncio.run(take_part(parser.parse_args()))


if __name__ == "__main__":
    main()
