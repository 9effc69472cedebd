"""The site's durable record of what was spent of a data set: one file, one process, one order of writes.

A record is appended and synced, then the head is, then the call returns; whatever a crash interrupts, what
is on disk says at least what left. The rules are in `fedge.privacy.ledger`, the accounting is by RDP.
"""

from __future__ import annotations

import fcntl
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Self

from fedge.errors import RefusedError, StorageError
from fedge.events import OrderId
from fedge.faults import Faults
from fedge.files import private_folder
from fedge.privacy import ledger
from fedge.privacy.config import Protected
from fedge.privacy.ledger import (
    Books,
    Commit,
    Record,
    Release,
    Reserve,
    Sending,
    Trusted,
    Unprotected,
)
from fedge.privacy.lines import NONCE_BYTES, Header, Line, decode, encode, encode_header
from fedge.privacy.mechanism import Mechanism
from fedge_client.ledger_file import (
    MAX_FILE_BYTES,
    Chain,
    Head,
    Paths,
    check_dataset,
    check_head,
    hash_at,
    read_chain,
    read_head,
    refuse,
    sync_folder,
    write_all,
    write_head,
)

Clock = Callable[[], datetime]

_MAX_REASON = 1000


def _now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """A data set's ledger, opened, verified and recovered, for this process alone.

    Every method may be called on any thread, and blocks for the writes of one record.

    **Guarantees.** When `reserve`, `sending`, `commit`, `release` or `unprotected` returns, its record is
    durable. `books.spent()` is never less than what left after `sending` returned, whatever crashes: a
    ledger that was cut off, rolled back, changed, removed or is in use is refused. A head that was rolled
    back together with it is found out only by whoever remembers a later one: `check_witness`.

    Raises:
        RefusedError: LEDGER_UNUSABLE, when opened or when a record cannot be written. After a failed write
            nothing more is accepted until the ledger is opened again.
    """

    def __init__(
        self, paths: Paths, delta: float, reach: Callable[[str], None], now: Clock, *, anew: bool
    ) -> None:
        """See `open`. `anew`: a ledger that is gone may be begun again."""
        self._paths = paths
        self._delta = delta
        self._reach = reach
        self._now = now
        self._lock = threading.RLock()
        self._unusable = ""
        self._chain = Chain()
        self._descriptor = _open_locked(paths, anew=anew)

    @classmethod
    def open(
        cls,
        folder: Path,
        dataset: str,
        delta: float,
        faults: Faults | None = None,
        *,
        head_folder: Path,
        now: Clock = _now,
        trust: str = "",
    ) -> Self:
        """Open or begin the ledger of a data set, whose records say what is spent at `delta`.

        `trust` is a reason to accept it as it is, whatever its head says; see `accept_head`.

        Raises:
            RefusedError: LEDGER_UNUSABLE: it is in use, or not as it was left; the message says what to do.
            ValueError: `delta` is not in (0, 1).
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta: expected a number between 0 and 1, found {delta}")
        try:
            for each in (folder, *(() if head_folder.is_dir() else (head_folder,))):
                private_folder(each)
        except StorageError as error:
            refuse(str(error))
        paths = Paths.of(folder, dataset, head_folder)
        opened = cls(paths, float(delta), (faults or Faults()).reach, now, anew=bool(trust))
        try:
            opened._load(dataset, trust)
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def books(self) -> Books:
        """What is on disk."""
        return self._chain.books

    @property
    def head(self) -> Head:
        """The number and hash of the last record, for somebody else to remember."""
        return self._chain.head

    def reserve(
        self,
        run_id: str,
        order: OrderId,
        mechanism: Mechanism,
        *,
        unit: Protected,
        max_epsilon: float,
        run_caps: Mapping[float, float] = MappingProxyType({}),
    ) -> int:
        """Set aside the most that the work for an order may spend; the number of its entry.

        Raises:
            RefusedError: BUDGET_EXHAUSTED: it exceeds a cap, see `fedge.privacy.ledger.admit`.
        """
        with self._lock:
            self._check_usable()
            ledger.admit(
                self.books,
                mechanism,
                unit=unit,
                delta=self._delta,
                max_epsilon=max_epsilon,
                run_id=run_id,
                run_caps=run_caps,
            )
            entry = self.books.next_entry
            self._append(Reserve(entry, run_id, order, unit, mechanism))
            return entry

    def sending(self, entry: int) -> None:
        """To be called before the first byte leaves that depends on the data.

        Raises:
            LocalProtocolError: the entry is not reserved, or is sending already.
        """
        self._append(Sending(entry))

    def commit(self, entry: int, mechanism: Mechanism) -> None:
        """What was spent in fact.

        Raises:
            LocalProtocolError: the entry is not sending, or this is not what was reserved, or more of it.
        """
        self._append(Commit(entry, mechanism))

    def release(self, entry: int) -> None:
        """Nothing left, and nothing of it will.

        Raises:
            LocalProtocolError: the entry is not reserved, or is sending.
        """
        self._append(Release(entry))

    def unprotected(self, run_id: str) -> None:
        """A run without differential privacy takes part; recorded once, however often it is said."""
        with self._lock:
            self._check_usable()
            if not self.books.of_run(run_id).unprotected:
                self._append(Unprotected(run_id))

    def check_witness(self, seq: int, digest: bytes) -> None:
        """Compare with a `head` that somebody else remembers. What its owner has just accepted is in order.

        Raises:
            RefusedError: LEDGER_UNUSABLE: this ledger is older, or another one; nothing is accepted any more.
        """
        remedy = (
            "restore the newest copy; if the data set's owner put this one back on purpose, "
            "`fedge client ledger --trust` accepts it as it is"
        )
        with self._lock:
            self._check_usable()
            if seq == 0 or self.books.trusted:  # it was empty then: nothing can be missing
                return
            if seq > self.head[0]:
                self._unusable = (
                    f"{self._paths.ledger}: a witness remembers {seq} records, found {self.head[0]}: it was "
                    f"replaced by an older copy, so that spent budget is missing; {remedy}"
                )
            elif seq < 0 or hash_at(self._descriptor, seq) != digest:
                self._unusable = (
                    f"{self._paths.ledger}: a witness remembers another record {seq} than the one here: the "
                    f"ledger was tampered with or replaced; {remedy}"
                )
            self._check_usable()

    def close(self) -> None:
        """Give the ledger to the next process. May be called twice."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            self._unusable = self._unusable or f"{self._paths.ledger}: it is closed; open it again"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, dataset: str, trust: str) -> None:
        """Read, compare with the head, and close what a crash left open."""
        path = self._paths.ledger
        head = _head_or_none(self._paths.head) if trust else read_head(self._paths.head)
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            chain = read_chain(file, path, head=head)
        check_dataset(chain, dataset, path)
        try:
            check_head(chain, head, self._paths)
        except RefusedError:
            if not trust:
                raise
        self._chain = replace(chain, torn=0)
        with self._writing():
            if chain.torn:  # no head speaks of it: the call that wrote it never returned
                os.ftruncate(self._descriptor, chain.size)
                os.fsync(self._descriptor)
            if chain.header is None:
                header = Header(dataset, self._now(), os.urandom(NONCE_BYTES))
                self._write(*encode_header(header), Books())
            elif chain.head != head and not trust:
                write_head(self._paths.head, chain.head, before_rename=lambda: None)
        for record in ledger.recover(self.books)[1]:
            self._append(record)
        if trust:
            self._append(Trusted(trust))

    def _append(self, record: Record) -> None:
        with self._lock:
            self._check_usable()
            books = ledger.step(self.books, record)
            seq, previous = self.head
            epsilon = books.spent().epsilon(self._delta)
            bound = epsilon if math.isfinite(epsilon) else None
            line = Line(seq + 1, previous, self._now(), self._delta, bound, record)
            try:
                data, digest = encode(line)
            except ValueError as error:
                refuse(f"{self._paths.ledger}: {error}; give the run a shorter name")
            decode(data)  # what could not be read again would lock out the owner: rather fail now
            if self._chain.size + len(data) > MAX_FILE_BYTES:
                refuse(
                    f"{self._paths.ledger}: expected at most {MAX_FILE_BYTES} bytes, found no more room; give the "
                    "data set a new name"
                )
            with self._writing():
                self._write(data, digest, books)

    def _write(self, data: bytes, digest: bytes, books: Books) -> None:
        """The order that everything rests on: append, sync, then the head."""
        self._reach("ledger.append")
        half = len(data) // 2
        write_all(self._descriptor, data[:half])
        self._reach("ledger.half")
        write_all(self._descriptor, data[half:])
        self._reach("ledger.written")
        os.fsync(self._descriptor)
        head = (self._chain.head[0] + 1, digest)
        if head[0] == 0:
            sync_folder(self._paths.ledger.parent)
        self._reach("ledger.synced")
        write_head(self._paths.head, head, before_rename=lambda: self._reach("ledger.head"))
        size = self._chain.size + len(data)
        self._chain = replace(self._chain, head=head, books=books, size=size)
        self._reach("ledger.done")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A failed write may have left part of a line: only reading it all again tells."""
        try:
            yield
        except OSError as error:
            self._unusable = (
                f"{self._paths.ledger}: a record cannot be written: {error.strerror}; nothing more is accepted: "
                "make room or give this user access, then start the client again"
            )
            refuse(self._unusable)

    def _check_usable(self) -> None:
        if not self._unusable and not _is_at(self._descriptor, self._paths.ledger):
            self._unusable = (
                f"{self._paths.ledger}: the file was replaced or removed while it is in use: restore the newest copy, "
                "and start the client again"
            )
        if self._unusable:
            refuse(self._unusable)


def accept_head(
    folder: Path, dataset: str, delta: float, faults: Faults | None = None, *, head_folder: Path, reason: str
) -> bool:
    """Accept a ledger, as it is, whose head, or a witness, says otherwise: its owner replaced it on purpose.

    The decision is itself a record. False if the last record says so already.

    Raises:
        RefusedError: LEDGER_UNUSABLE: its own chain is broken, which no one can accept, or it is in use.
    """
    trust = reason
    try:
        with Ledger.open(folder, dataset, delta, faults, head_folder=head_folder) as opened:
            if opened.books.trusted:
                return False
    except RefusedError as error:
        trust = f"{reason}: {error}"[:_MAX_REASON]
    Ledger.open(folder, dataset, delta, faults, head_folder=head_folder, trust=trust).close()
    return True


def _open_locked(paths: Paths, *, anew: bool) -> int:
    """The ledger's descriptor, for this process alone; a new file only where no head says there was one."""
    path = paths.ledger
    begin = os.O_CREAT if anew or path.exists() or not paths.head.exists() else 0
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | begin
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        check_head(Chain(), read_head(paths.head), paths)
        refuse(f"{path}: expected a ledger, found none; start again")
    except OSError as error:
        refuse(f"{path}: expected a regular file that this user can write, found another: {error.strerror}")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            refuse(f"{path}: expected a regular file, found something else; remove it")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o600)
    except BlockingIOError:
        os.close(descriptor)
        refuse(
            f"{path}: expected a ledger of this process alone, found another client at work with this data set: "
            "stop that one, or give this client another [ledger] dataset if its data is another"
        )
    except OSError as error:
        os.close(descriptor)
        refuse(f"{path}: cannot be locked: {error.strerror}")
    except RefusedError:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path leads to what is open: records of a file that has lost its name are read by nobody."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _head_or_none(path: Path) -> Head | None:
    try:
        return read_head(path)
    except RefusedError:
        return None
