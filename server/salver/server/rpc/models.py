"""ModelService: what is served, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import grpc

from salver.server.rpc import convert
from salver.server.rpc.served import Front, ServedModel, Task
from salver.server.rpc.validation import Violations, model_named
from salver.v1 import model_pb2, model_pb2_grpc


def version() -> str:
    """The installed version of Salver."""
    return metadata.version("salver")


def model_message(model: ServedModel, base: str) -> model_pb2.Model:
    """The served checkpoint, or it under an adapter, as clients see it. `base`: the checkpoint's name."""
    labels = model.labels if Task.CLASSIFY in model.tasks or Task.CLASSIFY_TOKENS in model.tasks else ()
    return model_pb2.Model(
        name=model.name,
        architecture=model.architecture,
        tasks=[task.value for task in model.tasks],
        max_model_len=model.limits.max_model_len,
        vocab_size=model.limits.vocab_size,
        num_parameters=model.ready.num_parameters,
        dtype=model.ready.dtype,
        quantization=model.ready.quantization,
        eos_token_ids=model.tokenizer.eos_token_ids,
        bos_token_id=model.tokenizer.bos_token_id,
        weights_digest=model.weights_digest,
        weights_version=model.weights_version,
        base=base if model.adapter else "",
        embedding_dimensions=model.embedding_dimensions or None,
        labels=labels,
    )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`startup_phases` are (name, seconds), filled before the model is served."""

    def __init__(
        self, front: Front, drain_period: float, startup_phases: Sequence[tuple[str, float]]
    ) -> None:
        self._front = front
        self._drain_period = drain_period
        self._startup_phases = startup_phases

    async def ListModels(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request.page_token:
            violations = Violations()
            violations.add("page_token", "is not one that this server gave: there is one page")
            violations.raise_any()
        model = self._front.model
        models = [model, *model.with_adapter.values()]
        return model_pb2.ListModelsResponse(models=[model_message(each, model.name) for each in models])

    async def GetModel(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        base = self._front.model
        model = model_named(request.model, base)
        return model_pb2.GetModelResponse(model=model_message(model, base.name))

    async def GetServerInfo(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        model = self._front.model
        limits = model.limits
        return model_pb2.GetServerInfoResponse(
            version=version(),
            limits=model_pb2.Limits(
                max_model_len=limits.max_model_len,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_queued_requests=limits.max_queued_requests,
                max_queued_tokens=limits.max_queued_tokens,
                max_message_bytes=limits.max_message_bytes,
                kv_cache_tokens=limits.cache_tokens,
                max_samples=limits.max_samples,
                max_top_logprobs=limits.max_top_logprobs,
                max_beams=min(limits.max_beams, limits.max_num_seqs),
            ),
            drain_period=convert.duration(self._drain_period),
            numerics_id=model.ready.numerics_id,
            weights_version=model.weights_version,
            device=model.ready.device,
            torch_version=model.ready.torch_version,
            startup_phases=[
                model_pb2.StartupPhase(name=name, duration=convert.duration(seconds))
                for name, seconds in self._startup_phases
            ],
            worker_restarts=self._front.engine.restarts,
        )
