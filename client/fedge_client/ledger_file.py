"""A ledger's files as they are on disk: the chain of lines read from its start, and the head beside the keys.

    <folder>/<dataset>.ledger          the lines, appended only
    <head folder>/<dataset>.head       the number and hash of the last one, where a copy of the folder is not

Nothing here decides what is written: see `fedge_client.ledger`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from fedge.errors import LocalProtocolError, RefusedError
from fedge.privacy import ledger
from fedge.privacy.ledger import Books
from fedge.privacy.lines import MAX_LINE_BYTES, Header, Line, decode, decode_head, decode_header, encode_head
from fedge.refusal import Refusal, RefusalCode

MAX_FILE_BYTES: Final = 1 << 30

HEADS: Final = "heads"
"""The folder of the heads, where there is no folder of keys to keep them in: in that of the ledgers."""

Head = tuple[int, bytes]
"""The number of a ledger's last line, from 0 (its header), and that line's hash."""


def refuse(message: str) -> NoReturn:
    """The ledger cannot be used.

    Raises:
        RefusedError: LEDGER_UNUSABLE, always.
    """
    raise RefusedError(Refusal(RefusalCode.LEDGER_UNUSABLE, message))


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a data set's ledger is, and its head."""

    ledger: Path
    head: Path

    @classmethod
    def of(cls, folder: Path, dataset: str, head_folder: Path) -> Paths:
        return cls(folder / f"{dataset}.ledger", head_folder / f"{dataset}.head")


@dataclass(frozen=True, slots=True)
class Chain:
    """A ledger that was read and verified: every hash, and every transition. By default one that is not there.

    `size` is the length of its whole lines in bytes; `torn` that of a last line that has no end. `at_head`
    is the hash of the line that a head speaks of, None if the ledger has no such line.
    """

    header: Header | None = None
    head: Head = (-1, b"")
    books: Books = field(default_factory=Books)
    size: int = 0
    torn: int = 0
    at_head: bytes | None = None


def read_chain(
    file: BinaryIO, path: Path, *, head: Head | None, visit: Callable[[Line], None] | None = None
) -> Chain:
    """Verify a ledger from its start. `visit` sees every line in turn.

    Raises:
        RefusedError: LEDGER_UNUSABLE: too large, a line that is not as it was written, a broken chain, a
            record that may not follow.
    """
    if (found := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
        refuse(
            f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {found}; give the data set a new name"
        )
    chain = Chain()
    header, seq, digest, books = chain.header, *chain.head, chain.books
    size, at_head = 0, None
    while raw := file.readline(MAX_LINE_BYTES + 1):
        if not raw.endswith(b"\n") and len(raw) <= MAX_LINE_BYTES:
            return Chain(header, (seq, digest), books, size, len(raw), at_head)
        try:
            if header is None:
                header, digest = decode_header(raw)
            else:
                line, own = decode(raw)
                if (line.seq, line.previous) != (seq + 1, digest):
                    raise ValueError("expected the line that follows the one before it, found another")
                digest = own
                books = ledger.step(books, line.record)
                if visit is not None:
                    visit(line)
        except (ValueError, LocalProtocolError) as error:
            refuse(
                f"{path}: line {seq + 2} is not what was written there: {str(error)[:300]}; restore the ledger "
                "from its newest copy"
            )
        seq, size = seq + 1, size + len(raw)
        if head is not None and head[0] == seq:
            at_head = digest
    return Chain(header, (seq, digest), books, size, 0, at_head)


def check_head(chain: Chain, head: Head | None, paths: Paths) -> None:
    """Compare a ledger with the head that was kept apart from it.

    Raises:
        RefusedError: LEDGER_UNUSABLE: it is older than its head, another one, or one of both is missing.
    """
    remedy = (
        "restore the newest copy; if the data set's owner replaced or moved it on purpose, "
        "`fedge client ledger --trust` accepts it as it is"
    )
    records = max(0, chain.head[0])
    if head is None:
        if records:
            refuse(
                f"{paths.head}: expected the head of {paths.ledger}, which has {records} records, found "
                f"none: it was removed, or another client wrote the ledger; {remedy}"
            )
    elif chain.header is None:
        refuse(f"{paths.ledger}: expected {head[0]} records, found no ledger: it was deleted; {remedy}")
    elif records < head[0]:
        refuse(
            f"{paths.ledger}: expected at least {head[0]} records, found {records}: it was cut off or "
            f"replaced by an older copy, so that spent budget is missing; {remedy}"
        )
    elif chain.at_head != head[1]:
        refuse(
            f"{paths.ledger}: expected record {head[0]} to be the one of {paths.head}, found another: it was "
            f"tampered with, or is another data set's; {remedy}"
        )


def check_dataset(chain: Chain, dataset: str, path: Path) -> None:
    """The file is the one of this data set.

    Raises:
        RefusedError: LEDGER_UNUSABLE: it is another's, under this one's name.
    """
    if chain.header is not None and chain.header.dataset != dataset:
        refuse(
            f"{path}: expected the ledger of data set {dataset!r}, found that of {chain.header.dataset!r}; "
            "restore the file's name"
        )


def read_only(
    folder: Path, dataset: str, *, head_folder: Path, visit: Callable[[Line], None] | None = None
) -> Chain:
    """Verify a ledger, and compare it with its head, while an agent may be at work with it.

    A last line that is not whole is being written, or was cut off by a crash: it is left out.

    Raises:
        RefusedError: LEDGER_UNUSABLE: as `Ledger.open` does, except that it may be in use.
    """
    paths = Paths.of(folder, dataset, head_folder)
    head = read_head(paths.head)  # first: what is appended in the meantime is ahead of it
    chain = Chain()
    try:
        with open(paths.ledger, "rb", opener=_no_links) as file:  # Path.open takes no opener
            chain = read_chain(file, paths.ledger, head=head, visit=visit)
    except FileNotFoundError:
        pass
    except OSError as error:
        refuse(f"{paths.ledger}: cannot be read: {error.strerror}; give this user access to it")
    check_dataset(chain, dataset, paths.ledger)
    check_head(chain, head, paths)
    return chain


def read_head(path: Path) -> Head | None:
    """The head; None if there is none.

    Raises:
        RefusedError: LEDGER_UNUSABLE: it cannot be read, or is not one.
    """
    try:
        with open(path, "rb", opener=_no_links) as file:  # Path.open takes no opener
            data = file.read(MAX_LINE_BYTES)
        return decode_head(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        refuse(f"{path}: cannot be read: {error.strerror}; give this user access to it")
    except ValueError:
        refuse(
            f"{path}: expected the number and hash of a ledger's last line, found something else; remove it, and "
            "if the ledger is in order accept it with `fedge client ledger --trust`"
        )


def write_head(path: Path, head: Head, *, before_rename: Callable[[], None]) -> None:
    """Replace the head, all or nothing, durable when it returns.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o600)
    try:
        write_all(descriptor, encode_head(*head))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    before_rename()
    temporary.replace(path)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it.

    Raises:
        OSError: it cannot be written whole.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable.

    Raises:
        OSError: it cannot be done.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_at(descriptor: int, seq: int) -> bytes:
    """The hash of a line of a chain that was verified."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        for _ in range(seq):
            file.readline()
        raw = file.readline()
    with suppress(ValueError):
        return decode(raw)[1] if seq else decode_header(raw)[1]
    return b""


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
