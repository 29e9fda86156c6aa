"""The calls, as data: what is sent where, and how the reply is read. Both clients share them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from salver.client import convert, encoding, health
from salver.client import model_card as card
from salver.client.convert import Conversation, PromptLike
from salver.client.options import DEFAULT_TIMEOUT, GENERATION_TIMEOUT
from salver.client.types import ChatOptions, GenerationOptions, Resume, ScoreOptions
from salver.v1 import (
    admin_pb2_grpc,
    common_pb2,
    encoding_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inspection_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)

_MAX_SEED_BITS = 63


class Stubs:
    """Every method of a server, on a channel of either kind."""

    def __init__(self, channel: Any) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self.encoding: Any = encoding_pb2_grpc.EncodingServiceStub(channel)
        self.inspection: Any = inspection_pb2_grpc.InspectionServiceStub(channel)
        self.tokenization: Any = tokenization_pb2_grpc.TokenizationServiceStub(channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(channel)
        self.health: Any = health.check(channel)


@dataclass(frozen=True, slots=True)
class Rpc:
    """One call. `again`: whether the SDK begins it anew, as gRPC's own retries do not always."""

    method: Callable[[Stubs], Any]
    request: Any
    decode: Callable[[Any], Any]
    timeout: float
    again: bool = False
    resume: Resume | None = None


def generate(prompt: PromptLike, options: GenerationOptions, *, stream: bool = False) -> Rpc:
    """Raises TypeError for an option that does not exist."""
    make: Any = generation_pb2.StreamGenerateRequest if stream else generation_pb2.GenerateRequest
    request = convert.to_generation(make, options, prompt=convert.to_prompt(prompt))
    return _generation("generation.StreamGenerate" if stream else "generation.Generate", request, options)


def chat(messages: Conversation, options: ChatOptions, *, stream: bool = False) -> Rpc:
    """Raises TypeError for an option that does not exist."""
    make: Any = generation_pb2.StreamChatRequest if stream else generation_pb2.ChatRequest
    request = convert.to_generation(make, options, messages=convert.to_messages(messages))
    return _generation("generation.StreamChat" if stream else "generation.Chat", request, options)


def _generation(method: str, request: Any, options: GenerationOptions) -> Rpc:
    # The seed is drawn here, so that a call that is begun anew gives the same answer. What a caller
    # resumes has its seed.
    if not request.sampling.HasField("seed") and not request.HasField("resume"):
        request.sampling.seed = secrets.randbits(_MAX_SEED_BITS) or 1
    timeout = options.get("timeout") or GENERATION_TIMEOUT
    return Rpc(
        attrgetter(method), request, convert.from_generation, timeout, True, resume=options.get("resume")
    )


def score(inputs: Iterable[tuple[PromptLike, PromptLike]], options: ScoreOptions) -> Rpc:
    request = convert.to_score(inputs, options)
    timeout = options.get("timeout") or GENERATION_TIMEOUT
    return Rpc(attrgetter("generation.Score"), request, convert.from_score, timeout, True)


def encode(method: str, request: Any, decode: Callable[[Any], Any], options: Any) -> Rpc:
    """A call of EncodingService; the same request has the same answer, so it may be begun anew."""
    return Rpc(attrgetter(f"encoding.{method}"), request, decode, encoding.timeout_of(options), True)


def inspect(method: str, request: Any, decode: Callable[[Any], Any], options: Any) -> Rpc:
    """A call of InspectionService; the same request has the same answer, so it may be begun anew."""
    return Rpc(attrgetter(f"inspection.{method}"), request, decode, encoding.timeout_of(options), True)


def tokenize(text: str, add_special_tokens: bool | None, timeout: float | None) -> Rpc:
    request = tokenization_pb2.TokenizeRequest(text=text)
    if add_special_tokens is not None:
        request.add_special_tokens = add_special_tokens
    return _other("tokenization.Tokenize", request, convert.from_tokens, timeout)


def detokenize(token_ids: Sequence[int], skip_special_tokens: bool | None, timeout: float | None) -> Rpc:
    request = tokenization_pb2.DetokenizeRequest(token_ids=common_pb2.TokenIds(ids=token_ids))
    if skip_special_tokens is not None:
        request.skip_special_tokens = skip_special_tokens
    return _other("tokenization.Detokenize", request, attrgetter("text"), timeout)


def list_models(page_token: str, timeout: float | None) -> Rpc:
    """One page: its models, and the token of the next page ("" for none)."""

    def decode(reply: model_pb2.ListModelsResponse) -> Any:
        return [convert.from_model(model) for model in reply.models], reply.next_page_token

    request = model_pb2.ListModelsRequest(page_token=page_token)
    return _other("models.ListModels", request, decode, timeout)


def get_model(model: str, timeout: float | None) -> Rpc:
    def decode(reply: model_pb2.GetModelResponse) -> Any:
        return convert.from_model(reply.model)

    return _other("models.GetModel", model_pb2.GetModelRequest(model=model), decode, timeout)


def model_card(model: str, context: int | None, timeout: float | None) -> Rpc:
    request = card.model_card_request(model, context)
    return _other("inspection.GetModelCard", request, card.model_card, timeout)


def server_info(timeout: float | None) -> Rpc:
    request = model_pb2.GetServerInfoRequest()
    return _other("models.GetServerInfo", request, convert.from_server_info, timeout)


def check_health(service: str, timeout: float | None) -> Rpc:
    return _other("health", health.request(service), health.status, timeout)


def _other(method: str, request: Any, decode: Callable[[Any], Any], timeout: float | None) -> Rpc:
    return Rpc(attrgetter(method), request, decode, timeout or DEFAULT_TIMEOUT)
