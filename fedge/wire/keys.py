"""The directory of identity keys to a message and back. What a peer sends is data: it is trusted once it is checked."""

from __future__ import annotations

from fedge.errors import ConfigError, LimitError, RemoteProtocolError
from fedge.principal import check_name
from fedge.secagg.directory import KEY_BYTES, MAX_STATEMENTS, Directory, Statement
from fedge.signing import MAX_SIGNATURE_BYTES, SignedDirectory
from fedge.wire import fedge_pb2 as pb
from fedge.wire.limits import check_text


def encode_directory(signed: SignedDirectory) -> pb.Directory:
    directory = signed.directory
    return pb.Directory(
        federation=directory.federation,
        epoch=directory.epoch,
        statements=[
            pb.Statement(site=each.site, key=each.key, not_before=each.not_before, not_after=each.not_after)
            for each in directory.statements
        ],
        signature=signed.signature,
    )


def decode_directory(message: pb.Directory) -> SignedDirectory:
    """A directory and its signature, both unchecked, if they are of the right form.

    Raises:
        LimitError: it has more statements, or a longer name, than any may have.
        RemoteProtocolError: it is malformed.
    """
    count = len(message.statements)
    if count > MAX_STATEMENTS:
        raise LimitError(f"expected a directory of at most {MAX_STATEMENTS} sites, found {count}")
    federation = check_text("a federation's id", message.federation)
    if not message.epoch or not 0 < len(message.signature) <= MAX_SIGNATURE_BYTES:
        raise RemoteProtocolError(
            f"expected a directory of epoch >= 1 with a signature of 1 to {MAX_SIGNATURE_BYTES} bytes, "
            f"found epoch {message.epoch} and {len(message.signature)} bytes"
        )
    statements = map(_statement, message.statements)
    return SignedDirectory(Directory.of(federation, message.epoch, statements), message.signature)


def _statement(message: pb.Statement) -> Statement:
    try:
        site = check_name(message.site)
    except ConfigError as error:
        raise RemoteProtocolError(f"directory of sites: {error}") from None
    if len(message.key) != KEY_BYTES:
        raise RemoteProtocolError(
            f"directory of sites: expected a key of {KEY_BYTES} bytes for {site}, found {len(message.key)}"
        )
    return Statement(site, message.key, message.not_before, message.not_after)
