"""grpc.health.v1 without a package for it: its two messages are one string and one enum."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

METHOD = "/grpc.health.v1.Health/Check"
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def _messages() -> tuple[Any, Any]:
    """The classes of HealthCheckRequest and HealthCheckResponse, in a descriptor pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(
        name="salver/client/health.proto", package="grpc.health.v1", syntax="proto3"
    )
    request = file.message_type.add(name="HealthCheckRequest")
    optional = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
    request.field.add(
        name="service", number=1, label=optional, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING
    )
    response = file.message_type.add(name="HealthCheckResponse")
    # On the wire an enum is an int32.
    response.field.add(
        name="status", number=1, label=optional, type=descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call,unused-ignore]
    find = pool.FindMessageTypeByName
    return (
        message_factory.GetMessageClass(find("grpc.health.v1.HealthCheckRequest")),
        message_factory.GetMessageClass(find("grpc.health.v1.HealthCheckResponse")),
    )


_REQUEST, _RESPONSE = _messages()


def check(channel: Any) -> Any:
    """The unary callable of Check on a channel of either kind."""
    return channel.unary_unary(
        METHOD, request_serializer=_REQUEST.SerializeToString, response_deserializer=_RESPONSE.FromString
    )


def request(service: str) -> Any:
    return _REQUEST(service=service)


def status(response: Any) -> str:
    """SERVING, NOT_SERVING, ..."""
    return _STATUSES[response.status] if response.status < len(_STATUSES) else str(response.status)
