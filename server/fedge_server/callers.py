"""Who is calling: the certificate that TLS has verified, checked again on every call."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from grpc import aio

from fedge.errors import BusyError, FedgeError, IdentityError, RemoteProtocolError, StorageError
from fedge.principal import Principal, Role, principal_of
from fedge.wire.codec import shorten
from fedge.wire.limits import MAX_SMALL_BYTES
from fedge.wire.status import RETRY_AFTER, status_of
from fedge_server.membership import Membership

log = logging.getLogger(__name__)

S = TypeVar("S")
Q = TypeVar("Q")
R = TypeVar("R")

Context = aio.ServicerContext[Any, Any]


# A connection presents the same bytes on every call; parsing them once is enough.
_parse = functools.lru_cache(maxsize=4096)(principal_of)


async def caller(context: Context, membership: Membership, *, role: Role) -> Principal:
    """The caller, if its certificate has this role and still counts.

    TLS checks a certificate when a connection opens; connections outlive certificates and revocations.

    Raises:
        IdentityError: it has another role, has expired, was revoked or superseded.
        StorageError: the records that say so cannot be read.
    """
    pems = context.auth_context().get("x509_pem_cert")
    if not pems:
        raise IdentityError("expected a client certificate, found none")
    principal = _parse(next(iter(pems)))
    if principal.role != role:
        raise IdentityError(f"expected a certificate of the role {role!r}, found {principal.uri}")
    await membership.check(principal)
    return principal


async def messages(requests: AsyncIterator[Q | None]) -> AsyncIterator[Q]:
    """A stream's messages as they arrive.

    Raises:
        RemoteProtocolError: the peer sent bytes that are no message.
    """
    async for request in requests:
        if request is None:
            raise not_a_message()
        yield request


def not_a_message() -> RemoteProtocolError:
    """What to say of bytes that could not be parsed, or were too many to be."""
    return RemoteProtocolError(
        f"expected a message of this service of at most {MAX_SMALL_BYTES} bytes, found something else"
    )


async def refuse(context: Context, error: FedgeError) -> NoReturn:
    """End a call with the status that this kind of error has on the wire."""
    status, details = status_of(error), shorten(str(error))
    if isinstance(error, StorageError):
        # A file of ours that cannot be written: the operator's to know, with its path, not the peer's.
        log.error("store_failed reason=%s", error)
        details = "the coordinator cannot write its records; see its log"
    trailing = ((RETRY_AFTER, f"{error.retry_after_s:.3f}"),) if isinstance(error, BusyError) else ()
    try:
        await context.abort(grpc.StatusCode[status], details, trailing)
    except aio.InternalError:  # the peer is gone: there is nobody to tell
        raise asyncio.CancelledError from None


def answering(
    method: Callable[[S, Q, Context], Awaitable[R]],
) -> Callable[[S, Q, Context], Awaitable[R]]:
    """A unary reply's method, with our errors turned into gRPC statuses."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except FedgeError as error:
            await refuse(context, error)

    return wrapped
