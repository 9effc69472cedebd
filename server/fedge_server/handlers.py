"""Which method answers which call. Bulk messages pass as bytes, so that chunks are not copied on the way."""

from __future__ import annotations

import grpc
from grpc import aio

from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge_server.admin import AdminService
from fedge_server.service import EnrolmentService, FederationService


def add_services(
    server: aio.Server, federation: FederationService, enrolment: EnrolmentService, admin: AdminService
) -> None:
    """Register all that this coordinator answers."""
    handlers = {
        "Session": grpc.stream_stream_rpc_method_handler(
            federation.Session,
            request_deserializer=pb.ClientMessage.FromString,
            response_serializer=pb.ServerMessages.SerializeToString,
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            federation.Fetch, request_deserializer=pb.FetchRequest.FromString, response_serializer=None
        ),
        "Deliver": grpc.stream_unary_rpc_method_handler(
            federation.Deliver,
            request_deserializer=None,
            response_serializer=pb.Receipt.SerializeToString,
        ),
        "Resume": grpc.unary_unary_rpc_method_handler(
            federation.Resume,
            request_deserializer=pb.ResumeRequest.FromString,
            response_serializer=pb.ResumeReply.SerializeToString,
        ),
        "Renew": grpc.unary_unary_rpc_method_handler(
            federation.Renew,
            request_deserializer=pb.EnrolRequest.FromString,
            response_serializer=pb.EnrolReply.SerializeToString,
        ),
    }
    name = pb.DESCRIPTOR.services_by_name["Federation"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    services.add_EnrolmentServicer_to_server(enrolment, server)
    services.add_AdminServicer_to_server(admin, server)
