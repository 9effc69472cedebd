"""Which method answers which call. Bulk messages pass as bytes, so that chunks are not copied on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire.chunks import encoded, open_app_request
from fedge.wire.limits import MAX_SMALL_BYTES
from fedge_server.admin import AdminService
from fedge_server.callers import Context, not_a_message, refuse
from fedge_server.service import EnrolmentService, FederationService

M = TypeVar("M", bound=Message)
R = TypeVar("R")


def add_services(
    server: aio.Server, federation: FederationService, enrolment: EnrolmentService, admin: AdminService
) -> None:
    """Register all that this coordinator answers."""
    sites = {
        "Session": grpc.stream_stream_rpc_method_handler(
            federation.Session,
            request_deserializer=_capped(pb.ClientMessage),
            response_serializer=pb.ServerMessages.SerializeToString,
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            _streaming(federation.Fetch),
            request_deserializer=_capped(pb.FetchRequest),
            response_serializer=None,
        ),
        "Deliver": grpc.stream_unary_rpc_method_handler(
            federation.Deliver,
            request_deserializer=None,
            response_serializer=pb.Receipt.SerializeToString,
        ),
        "Resume": grpc.unary_unary_rpc_method_handler(
            _answering(federation.Resume),
            request_deserializer=_capped(pb.ResumeRequest),
            response_serializer=pb.ResumeReply.SerializeToString,
        ),
        "Renew": grpc.unary_unary_rpc_method_handler(
            _answering(federation.Renew),
            request_deserializer=_capped(pb.EnrolRequest),
            response_serializer=pb.EnrolReply.SerializeToString,
        ),
        "Keys": grpc.unary_unary_rpc_method_handler(
            _answering(federation.Keys),
            request_deserializer=_capped(pb.DirectoryRequest),
            response_serializer=None,
        ),
    }
    newcomers = {
        "Enrol": grpc.unary_unary_rpc_method_handler(
            _answering(enrolment.Enrol),
            request_deserializer=_capped(pb.EnrolRequest),
            response_serializer=pb.EnrolReply.SerializeToString,
        )
    }
    for service, handlers in (("Federation", sites), ("Enrolment", newcomers)):
        name = pb.DESCRIPTOR.services_by_name[service].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    operators = {
        "App": grpc.stream_stream_rpc_method_handler(
            admin.App, request_deserializer=open_app_request, response_serializer=encoded
        )
    }
    # The first that knows a call answers it: this one comes before the generated one.
    name = pb.DESCRIPTOR.services_by_name["Admin"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, operators),))
    services.add_AdminServicer_to_server(admin, server)


def _capped(kind: type[M]) -> Callable[[bytes], M | None]:
    """Parse a message of this kind. None: it is none, or larger than any honest one.

    An exception here would be gRPC's to log, with a traceback for each message that a peer cares to send.
    """

    def parse(data: bytes) -> M | None:
        if len(data) > MAX_SMALL_BYTES:
            return None
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return parse


def _answering(
    method: Callable[[M, Context], Awaitable[R]],
) -> Callable[[M | None, Context], Awaitable[R]]:
    async def answer(request: M | None, context: Context) -> R:
        if request is None:
            await refuse(context, not_a_message())
        return await method(request, context)

    return answer


def _streaming(
    method: Callable[[M, Context], AsyncIterator[R]],
) -> Callable[[M | None, Context], AsyncIterator[R]]:
    async def stream(request: M | None, context: Context) -> AsyncIterator[R]:
        if request is None:
            await refuse(context, not_a_message())
        async for reply in method(request, context):
            yield reply

    return stream
