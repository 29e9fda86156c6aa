"""Requests that nobody would think of, for every method that a server has, as its reflection tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import strategies as st

MAX_DEPTH = 5
# Kinds of integers: bits, and whether they have a sign.
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (32, True),
    FieldDescriptor.CPPTYPE_INT64: (64, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}
# What a field of this name often has. Half the requests have such values alone, so that some get far.
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just(""),
    "request_id": st.sampled_from(["", "an id"]),
    "temperature": st.sampled_from([0.0, 0.7, 1.0]),
    "max_tokens": st.integers(1, 4),
    "min_tokens": st.integers(0, 2),
    "n": st.integers(1, 3),
    "priority": st.integers(-3, 3),
    "role": st.integers(1, 4),
    "text": st.sampled_from(["hello", "a b c", "\U0001f600"]),
    "content": st.text(max_size=9),
    "top_p": st.sampled_from([0.5, 1.0]),
    "top_k": st.integers(0, 5),
    "seed": st.integers(1, 9),
    "stop": st.sampled_from(["ab", "e"]),
    "num_beams": st.integers(1, 4),
}
# Parts that a request often has. Plausible ones have few others: many are refused beside one another.
USUAL_PARTS = {"prompt", "sampling", "stopping", "messages", "inputs", "context", "continuation"}
STRINGS = ["", "\0", "a", "\U0001f600" * 3, "x" * 100_000, "../../etc/passwd", "{{ 7 * 7 }}", "‮‏ẞ"]
UNKNOWN_FIELDS = [
    b"",
    b"\xc0\x3e\x07",  # number 1000, an integer
    b"\xc2\x3e\x03abc",  # the same number, bytes
    b"\xc3\x3e\xc3\x3e\xc4\x3e\xc4\x3e",  # groups in groups
    b"\x9a\xff\xff\xff\x0f\x00",  # a number near the largest
]


@dataclass(frozen=True)
class Method:
    """One method of the server."""

    path: str
    request: Descriptor
    request_streaming: bool
    response_streaming: bool

    @classmethod
    def of(cls, method: MethodDescriptor) -> Method:
        path = f"/{method.containing_service.full_name}/{method.name}"
        return cls(path, method.input_type, method.client_streaming, method.server_streaming)

    def call(self, channel: grpc.Channel, payloads: list[bytes], timeout: float) -> grpc.StatusCode:
        """Sends the bytes as they are (one message, unless requests stream); the status of the answer."""
        arity = ("unary", "stream")
        make = getattr(channel, f"{arity[self.request_streaming]}_{arity[self.response_streaming]}")
        request = iter(payloads) if self.request_streaming else payloads[0]
        try:
            if self.response_streaming:
                for _ in make(self.path)(request, timeout=timeout):
                    pass
            else:
                make(self.path)(request, timeout=timeout)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK


def methods(channel: grpc.Channel) -> list[Method]:
    """All methods of all services that the server's reflection lists."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    return [
        Method.of(method)
        for name in sorted(database.get_services())
        for method in pool.FindServiceByName(name).methods
    ]


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0, sane: bool = False) -> Message:
    """A message of the type, any field of it there or not, any value that the type admits.

    A `sane` one has plausible values, in fields where we know some.
    """
    message: Message = message_factory.GetMessageClass(descriptor)()
    oneofs: set[str] = set()
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if (oneof is not None and oneof.name in oneofs) or not draw(st.booleans()):
            continue
        if oneof is not None:
            oneofs.add(oneof.name)
        if field.message_type is not None and depth >= MAX_DEPTH:
            continue
        if sane and field.message_type is None and _plausible(field) is None:
            continue
        unusual = field.message_type is not None and field.name not in USUAL_PARTS
        if sane and unusual and draw(st.integers(0, 19)):
            continue
        _fill(draw, message, field, depth, sane)
    return message


def _fill(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int, sane: bool) -> None:
    target: Any = getattr(message, field.name)
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        for _ in range(draw(st.integers(0, 2))):
            at = draw(_values(key, sane))
            if value.message_type is None:
                target[at] = draw(_values(value, sane))
            else:
                target[at].CopyFrom(draw(messages(value.message_type, depth + 1, sane)))
    elif field.is_repeated:
        size = draw(st.sampled_from([0, 1, 1, 2, 3, 300 if kind is None else 4]))
        if kind is None and size > 3:
            value = draw(_values(field, sane))
            target.extend([value[:100] if isinstance(value, str | bytes) else value] * size)
        elif kind is None:
            target.extend(draw(_values(field, sane)) for _ in range(size))
        else:
            target.extend(draw(messages(kind, depth + 1, sane)) for _ in range(size))
    elif kind is not None:
        target.CopyFrom(draw(messages(kind, depth + 1, sane)))
        target.SetInParent()
    else:
        setattr(message, field.name, draw(_values(field, sane)))


def _plausible(field: FieldDescriptor) -> st.SearchStrategy[Any] | None:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    return st.integers(0, 250) if field.name.endswith("ids") else PLAUSIBLE.get(field.name)


def _values(field: FieldDescriptor, sane: bool) -> st.SearchStrategy[Any]:
    plausible = _plausible(field)
    if sane and plausible is not None:
        return plausible
    return _of_type(field)


def _of_type(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from([*known, -1, 99, 2**31 - 1, -(2**31)])
    if kind in INTEGERS:
        bits, signed = INTEGERS[kind]
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return st.one_of(
            st.sampled_from([0, 1, low, high, high - 1]), st.integers(0, 40), st.integers(low, high)
        )
    if kind == FieldDescriptor.CPPTYPE_FLOAT:
        return st.floats(width=32)
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return st.floats()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=20)
    return st.one_of(st.text(max_size=12), st.sampled_from(STRINGS))


def payloads(method: Method) -> st.SearchStrategy[list[bytes]]:
    """Well-formed messages of the method's request, with fields that it does not know among them."""
    whole = st.builds(
        lambda message, unknown: message.SerializeToString() + unknown,
        st.booleans().flatmap(lambda sane: messages(method.request, sane=sane)),
        st.sampled_from(UNKNOWN_FIELDS),
    )
    return st.lists(whole, min_size=1, max_size=3 if method.request_streaming else 1)


@st.composite
def _mutated(draw: st.DrawFn, method: Method) -> bytes:
    content = bytearray(draw(messages(method.request)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        change = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if change == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del content[at:]
        elif change == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        else:
            content[at:at] = content[: at + 1]
        del content[1 << 20 :]
    return bytes(content)


def broken_payloads(method: Method) -> st.SearchStrategy[list[bytes]]:
    """Bytes that are mostly no message: random ones, and damaged messages."""
    any_ = st.one_of(_mutated(method), st.binary(max_size=60))
    return st.lists(any_, min_size=1, max_size=2 if method.request_streaming else 1)
