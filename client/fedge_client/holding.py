"""The model that a site holds for a run, and how it reaches the one that an order names.

For strategies with mirrors it moves by itself: only the mean gradient is fetched, and the digest shows
that the mirror equals the coordinator's model to the bit. A mirror that is new or has drifted is replaced.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import numpy as np

from fedge.errors import RemoteProtocolError
from fedge.mirror import advance
from fedge.optimizer import Optimizer, Slots
from fedge.vector import Array, Layout, digest_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_optimizer
from fedge_client.download import Download

_ON_THREAD_BYTES = 1 << 20


class Source(Protocol):
    """Where blobs come from: the link. A download that was cut off is gone on with where it was."""

    async def fetch(self, run_id: str, download: Download) -> None: ...


class Holding:
    """`model` is the shared float32[layout.size] that the worker reads; `digest` is of its content."""

    def __init__(self, run_id: str, layout: Layout, model: Array) -> None:
        self._run_id = run_id
        self._layout = layout
        self._model = model
        self._slots: Slots | None = None
        self._parts: dict[str, Download] = {}
        """What has arrived of the vectors that are being fetched."""
        self.control: Array | None = None
        """The control variate that came with the latest order, float32[layout.trainable_size], if one did."""
        self.digest = b""
        self.models_fetched = 0
        self.gradients_fetched = 0

    async def reach(self, order: pb.Order, source: Source) -> None:
        """Make the held model the one that the order names, by the shortest way, and have what comes with it.

        Raises:
            RemoteProtocolError: what the coordinator sent is not what it announced.
            LinkError: the link broke on the way; the held model is then unknown, and what has arrived of
                the next one stays.
        """
        self.control = None
        await self._reach_model(order, source)
        if order.control.HasField("variate"):
            blob = order.control.variate
            self.control = await self._fetch("control", blob, source, self._layout.trainable_size)
            self._parts.clear()

    async def _reach_model(self, order: pb.Order, source: Source) -> None:
        mirrored = order.HasField("mirror")
        if self.digest == order.model.digest and (not mirrored or self._slots is not None):
            return
        if mirrored and order.mirror.HasField("advance") and await self._advance(order, source):
            return
        # Until all of it is here and checked, nothing is held.
        self.digest, self._slots = b"", None
        await self._fetch("model", order.model, source, self._model)
        self.models_fetched += 1
        if mirrored:
            self._slots = await self._fetch_slots(order.mirror, source)
        self.digest = order.model.digest
        self._parts.clear()

    async def _fetch(self, what: str, blob: pb.Blob, source: Source, room: Array | int) -> Array:
        """A blob's vector, float32, in this room or in a new one of so many elements."""
        part = self._parts.get(what)
        if part is None or part.digest != blob.digest:
            out: Array = np.empty(room, np.float32) if isinstance(room, int) else room
            part = self._parts[what] = Download(blob, out)
        try:
            await source.fetch(self._run_id, part)
        except RemoteProtocolError:
            del self._parts[what]  # what was sent is not what was announced: no part of it is of use
            raise
        return part.out

    async def _advance(self, order: pb.Order, source: Source) -> bool:
        """Apply the mean gradient to the mirror; False if there is no mirror to move, or it drifted."""
        step = order.mirror.advance
        if self._slots is None or self.digest != step.from_digest:
            return False
        gradient = await self._fetch("gradient", step.gradient, source, self._layout.size)
        self.gradients_fetched += 1
        optimizer = decode_optimizer(order.mirror.optimizer)
        if self._model.nbytes <= _ON_THREAD_BYTES:
            digest, slots = self._move(optimizer, gradient)
        else:
            digest, slots = await asyncio.to_thread(self._move, optimizer, gradient)
        self.digest, self._slots = digest, slots
        self._parts.clear()
        return digest == order.model.digest

    def _move(self, optimizer: Optimizer, gradient: Array) -> tuple[bytes, Slots]:
        assert self._slots is not None  # the caller has looked
        moved, slots = advance(
            optimizer, self._model, self._slots, gradient, trainable=self._layout.trainable_size
        )
        self._model[:] = moved
        return digest_of(moved), slots

    async def _fetch_slots(self, mirror: pb.Mirror, source: Source) -> Slots:
        size = self._layout.trainable_size
        count = decode_optimizer(mirror.optimizer).slot_count
        flat = await self._fetch("slots", mirror.slots, source, count * size)
        vectors = tuple(flat[at * size : (at + 1) * size] for at in range(count))
        return Slots(vectors, mirror.beta1_power, mirror.beta2_power)
