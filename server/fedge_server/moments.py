"""A run between two events: how it is taken to be kept, and what it is when it goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedge import federation
from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.history import Row
from fedge.learning import Learning
from fedge.pipeline import Update
from fedge.privacy.central import Central
from fedge.run_state import Federation, RunEffect, still_open
from fedge.snapshot import revive
from fedge.strategy import AnyStrategy
from fedge.vector import Layout, Model
from fedge_server.archive import Archive, Moment, Saved
from fedge_server.spool import NOTHING_HELD, Held, Spool, Upload
from fedge_server.store.machine import decode_machine, encode_machine
from fedge_server.store.records import KeptRun, KeptUpdate, Progress
from fedge_server.waiting import Accepted


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins or goes on: its state, the effects that are due, and the updates it has already."""

    learning: Learning
    machine: Federation
    effects: tuple[RunEffect, ...]
    rows: tuple[Row, ...] = ()
    accepted: tuple[Accepted, ...] = ()


def moment_of(
    run_id: str,
    machine: Federation,
    learning: Learning | None,
    *,
    rows: Sequence[Row] = (),
    accepted: Sequence[Accepted] = (),
) -> Moment:
    """The run as it is now; with its `learning` if rounds were committed since the last moment."""
    held = [(each, each.upload.held() if each.upload is not None else NOTHING_HELD) for each in accepted]
    progress = Progress(
        run_id,
        machine.status,
        machine.reason,
        machine.committed,
        encode_machine(machine),
        tuple(rows),
        updates=tuple(_kept_update(each, of) for each, of in held),
        cohorts=machine.cohorts,
    )
    saved = Saved(learning.vector, learning.kept) if learning is not None else None
    return Moment(progress, saved, [of for _, of in held])


def start_of(
    kept: KeptRun,
    strategy: AnyStrategy,
    central: Central | None,
    layout: Layout,
    archive: Archive,
    spool: Spool,
) -> Start:
    """Where a run goes on that an earlier process has kept. Blocks: it reads all of its vectors.

    Raises:
        StorageError: its records or its checkpoint cannot be read.
        LayoutError: the checkpoint is not one of this strategy.
    """
    blank = np.zeros(layout.size, np.float32)
    begun = Learning.begin(strategy, Model(blank, layout), central)
    learning = begun.revived(revive(archive.read(kept), Saved(blank, begun.kept)).state)
    found = [_accepted(update, spool) for update in kept.progress.updates]
    accepted = tuple(each for each in found if each is not None)
    of_order: dict[OrderId, set[str]] = {}
    for each in accepted:
        of_order.setdefault(each.order, set()).add(each.update.client)
    machine, effects = federation.resume(decode_machine(kept.progress.machine), of_order)
    wanted = still_open(machine, effects)
    for each in accepted:
        if each.order not in wanted:  # of an evaluation that is begun anew, with the model of now
            each.close()
    counting = tuple(each for each in accepted if each.order in wanted)
    return Start(learning, machine, effects, archive.store.rows(kept.record.run_id), counting)


def _kept_update(accepted: Accepted, held: Held) -> KeptUpdate:
    update, upload = accepted.update, accepted.upload
    return KeptUpdate(
        accepted.order,
        update.client,
        update.num_examples,
        upload.size if upload is not None else 0,
        upload.digest if upload is not None else b"",
        update.metrics,
        update.staleness,
        held.place,
        held.inline,
    )


def _accepted(kept: KeptUpdate, spool: Spool) -> Accepted | None:
    """The update, if all of it is still there: a file may have been lost, or have served another since."""
    upload: Upload | None = None
    if kept.inline is None:
        upload = spool.find(kept.place, size=kept.size, digest=kept.digest)
        if upload is None:
            return None
    elif kept.size:
        upload = spool.upload(size=kept.size, digest=kept.digest)
        try:
            upload.write(kept.inline)
            upload.finish()
        except RefusedError:
            return None
    vector = upload if upload is not None else np.zeros(0, np.float32)
    update = Update(kept.client, vector, kept.num_examples, kept.metrics, kept.staleness)
    return Accepted(kept.order, update, upload, kept=True)
