"""The model card as plain frozen data, and its call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from salver.client.convert import from_model
from salver.client.types import Model
from salver.v1 import inspection_pb2

_SOURCES = {
    inspection_pb2.HYPERPARAMETER_SOURCE_CONFIG: "config",
    inspection_pb2.HYPERPARAMETER_SOURCE_FAMILY: "family",
    inspection_pb2.HYPERPARAMETER_SOURCE_DERIVED: "derived",
    inspection_pb2.HYPERPARAMETER_SOURCE_GENERATION_CONFIG: "generation_config",
}


@dataclass(frozen=True, slots=True)
class ParameterTensor:
    """A tensor of the model; `bytes` as it was loaded, `held_bytes` as the server keeps it."""

    name: str
    checkpoint_names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    part: str
    held_bytes: int


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """The parameters of one part: embedding, attention, mlp, experts, norm or head."""

    part: str
    tensors: int
    weights: int
    biases: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """`source` is "config", "family", "derived" or "generation_config"; `field` its name in the file."""

    name: str
    value: Any
    source: str
    field: str


@dataclass(frozen=True, slots=True)
class MemoryArithmetic:
    """Bytes, and how many sequences of the card's context the cache holds."""

    predicted_weight_bytes: int
    held_weight_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    sequences: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class SpeedArithmetic:
    """Operations and bytes of a token, the device's roofline, and tokens a second: its bounds, the warm-up's,
    and as learned from requests. None: not of this model, or not measured yet."""

    prefill_operations: float
    decode_operations: float | None
    decode_bytes: float | None
    memory_bytes_per_second: float
    operations_per_second: float
    prefill_bound: float
    decode_bound: float | None
    prefill_warm_up: float
    decode_warm_up: float | None
    prefill_measured: float | None
    decode_measured: float | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a checkpoint is made of, takes and costs, for sequences of `context` tokens."""

    model: Model
    context: int
    tensors: tuple[ParameterTensor, ...]
    parameters: tuple[ParameterCount, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    memory: MemoryArithmetic
    speed: SpeedArithmetic
    device: str
    kernels: str


def model_card_request(model: str, context: int | None) -> inspection_pb2.GetModelCardRequest:
    return inspection_pb2.GetModelCardRequest(model=model, context=context)


def model_card(reply: inspection_pb2.GetModelCardResponse) -> ModelCard:
    return ModelCard(
        model=from_model(reply.model),
        context=reply.context,
        tensors=tuple(
            ParameterTensor(
                t.name, tuple(t.checkpoint_names), tuple(t.shape), t.dtype, t.bytes, t.part, t.held_bytes
            )
            for t in reply.tensors
        ),
        parameters=tuple(
            ParameterCount(p.part, p.tensors, p.weights, p.biases, p.held_bytes) for p in reply.parameters
        ),
        hyperparameters=tuple(
            Hyperparameter(h.name, json.loads(h.value), _SOURCES.get(h.source, ""), h.field)
            for h in reply.hyperparameters
        ),
        memory=MemoryArithmetic(**_fields(reply.memory)),
        speed=SpeedArithmetic(**_fields(reply.speed)),
        device=reply.device,
        kernels=reply.kernels,
    )


def _fields(message: Any) -> dict[str, Any]:
    """By name; None for what may be unset and is."""
    return {
        field.name: getattr(message, field.name)
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }
