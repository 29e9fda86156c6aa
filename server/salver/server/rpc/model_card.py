"""The model card: what the worker told of the model and the device, and the arithmetic on it."""

from __future__ import annotations

import json
from collections.abc import Iterable

import grpc

from salver.model.arithmetic import Arithmetic, LoadedTensor, Roofline, Storage
from salver.model.hyperparameters import Hyperparameter, Source
from salver.server.engine.request import Measured, Ready
from salver.server.rpc.errors import ApiError
from salver.server.rpc.models import model_message
from salver.server.rpc.served import ServedModel
from salver.server.rpc.validation import Violations
from salver.server.step_times import StepTimes
from salver.v1 import inspection_pb2

DEFAULT_CONTEXT = 1024
PARTS = ("embedding", "attention", "mlp", "experts", "norm", "head")
_SOURCES = {
    Source.CONFIG: inspection_pb2.HYPERPARAMETER_SOURCE_CONFIG,
    Source.FAMILY: inspection_pb2.HYPERPARAMETER_SOURCE_FAMILY,
    Source.DERIVED: inspection_pb2.HYPERPARAMETER_SOURCE_DERIVED,
    Source.GENERATION_CONFIG: inspection_pb2.HYPERPARAMETER_SOURCE_GENERATION_CONFIG,
}


def model_card(
    request: inspection_pb2.GetModelCardRequest, model: ServedModel, base: ServedModel, times: StepTimes
) -> inspection_pb2.GetModelCardResponse:
    """The card of `base`, under the name of `model`, which may be one of its adapters.

    Raises ApiError: INVALID_ARGUMENT for a context of 0, OUT_OF_RANGE for one that is longer than the
    server takes, UNAVAILABLE when the worker has told nothing.
    """
    ready, measured, spec = base.ready, base.ready.measured, base.spec
    if measured is None or spec is None:
        raise ApiError(grpc.StatusCode.UNAVAILABLE, "the worker has not measured its model")
    context = _context(request, base.limits.capacity)
    storage = storage_of(ready)
    arithmetic = Arithmetic(spec, measured.tensors, storage, ready.dtype)
    held = {tensor.name: storage.nbytes(tensor, spec) for tensor in measured.tensors}
    return inspection_pb2.GetModelCardResponse(
        model=model_message(model, base.name),
        context=context,
        tensors=[
            inspection_pb2.ParameterTensor(
                name=tensor.name,
                checkpoint_names=tensor.sources,
                shape=tensor.shape,
                dtype=tensor.dtype,
                bytes=tensor.nbytes,
                part=tensor.part,
                held_bytes=held[tensor.name],
            )
            for tensor in measured.tensors
        ],
        parameters=list(_counts(measured.tensors, held)),
        hyperparameters=[_hyperparameter(each) for each in base.hyperparameters],
        memory=_memory(base, measured, arithmetic, sum(held.values()), context),
        speed=_speed(ready, measured, arithmetic, times, context),
        device=ready.device,
        kernels=ready.kernels,
    )


def storage_of(ready: Ready) -> Storage:
    """How the worker holds the tensors."""
    return Storage(ready.kernels == "native", ready.quantization)


def _context(request: inspection_pb2.GetModelCardRequest, capacity: int) -> int:
    if not request.HasField("context"):
        return min(DEFAULT_CONTEXT, capacity)
    violations = Violations()
    if request.context == 0:
        violations.add("context", "must be at least 1")
    violations.raise_any()
    if request.context > capacity:
        raise ApiError(
            grpc.StatusCode.OUT_OF_RANGE,
            f"context {request.context}: the longest sequence that this server takes has {capacity} tokens",
        )
    return request.context


def _counts(tensors: Iterable[LoadedTensor], held: dict[str, int]) -> Iterable[inspection_pb2.ParameterCount]:
    """Of the parts that the model has, in their order."""
    of_parts: dict[str, list[LoadedTensor]] = {part: [] for part in PARTS}
    for tensor in tensors:
        of_parts[tensor.part].append(tensor)
    for part, found in of_parts.items():
        if found:
            yield inspection_pb2.ParameterCount(
                part=part,
                tensors=len(found),
                weights=sum(tensor.size for tensor in found if not tensor.is_bias),
                biases=sum(tensor.size for tensor in found if tensor.is_bias),
                held_bytes=sum(held[tensor.name] for tensor in found),
            )


def _hyperparameter(each: Hyperparameter) -> inspection_pb2.Hyperparameter:
    value = json.dumps(each.value, ensure_ascii=False)
    return inspection_pb2.Hyperparameter(
        name=each.name, value=value, source=_SOURCES[each.source], field=each.field
    )


def _memory(
    model: ServedModel, measured: Measured, arithmetic: Arithmetic, predicted: int, context: int
) -> inspection_pb2.MemoryArithmetic:
    ready, each = model.ready, arithmetic.kv_bytes_per_token
    blocks = -(-context // ready.block_size)
    if model.source is not None:
        blocks += -(-min(context, model.source.max_input_tokens) // ready.block_size)
    return inspection_pb2.MemoryArithmetic(
        predicted_weight_bytes=predicted,
        held_weight_bytes=measured.weight_bytes,
        kv_bytes_per_token=each,
        kv_cache_bytes=ready.num_blocks * ready.block_size * each,
        kv_cache_tokens=model.limits.cache_tokens,
        # Block 0 is nobody's.
        sequences=(ready.num_blocks - 1) // blocks,
        max_num_seqs=ready.max_num_seqs,
    )


def _speed(
    ready: Ready, measured: Measured, arithmetic: Arithmetic, times: StepTimes, context: int
) -> inspection_pb2.SpeedArithmetic:
    roofline = _shown(measured, arithmetic, times)
    prefill = arithmetic.prefill(context, ready.max_num_batched_tokens)
    found = inspection_pb2.SpeedArithmetic(
        prefill_operations=prefill.operations,
        memory_bytes_per_second=roofline.bytes_per_second,
        operations_per_second=roofline.operations_per_second,
        prefill_bound=roofline.tokens_per_second(prefill),
        prefill_warm_up=measured.prefill_speed,
    )
    decode = arithmetic.decode(context)
    if decode is not None:
        found.decode_operations, found.decode_bytes = decode.operations, decode.nbytes
        found.decode_bound = roofline.tokens_per_second(decode)
        found.decode_warm_up = measured.decode_speed
    if times.known and times.prefill > 0:
        found.prefill_measured = 1 / times.prefill
    if times.known and decode is not None and times.seconds(1) > 0:
        found.decode_measured = 1 / times.seconds(1)
    return found


def _shown(measured: Measured, arithmetic: Arithmetic, times: StepTimes) -> Roofline:
    """The roofline that was measured, raised to what the device has done since: on a machine that was
    busy at the start it is too low."""
    memory, operations = measured.roofline.bytes_per_second, measured.roofline.operations_per_second
    prefill = 1 / times.prefill if times.known and times.prefill > 0 else 0.0
    # Of the cheapest tokens: of a prompt so long that its head counts for nothing, without attention.
    operations = max(operations, max(prefill, measured.prefill_speed) * arithmetic.body_operations)
    decode = arithmetic.decode(1)
    if decode is not None:
        seconds = times.seconds(1) if times.known else 0.0
        speed = max(measured.decode_speed, 1 / seconds if seconds > 0 else 0.0)
        memory = max(memory, speed * decode.nbytes)
        operations = max(operations, speed * decode.operations)
    return Roofline(memory, operations)
