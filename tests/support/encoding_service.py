"""EncodingService over a real port with a real model, all in this process: the engine steps on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from salver.client import AsyncClient
from salver.model.embedding_modules import DenseModules
from salver.model.embedding_spec import read_embedding_spec
from salver.model.encoder import Encoder
from salver.model.encoder_config import read_any_spec
from salver.model.encoder_loader import load_encoder
from salver.model.encoder_spec import EncoderSpec
from salver.model.kernels.encoder_program import NativeEncoder
from salver.model.kernels.library import Library, Precision
from salver.model.tokenizer import Tokenizer
from salver.server.admission import Admission
from salver.server.config import ServerConfig
from salver.server.engine.core import EngineLimits
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.inline import InlineEngine
from salver.server.engine.process import EngineState, OutputSink
from salver.server.engine.request import EngineRequest, Ready
from salver.server.metrics import Metrics
from salver.server.rpc.served import Front, RequestLimits, ServedModel
from salver.server.rpc.server import STATUS_CODES, RpcServer, all_methods


class LoopEngine:
    """An `InlineEngine` that a task of the loop steps while there is work."""

    restarts = 0

    def __init__(self, inline: InlineEngine) -> None:
        self.inline = inline
        self.step_tokens: list[list[int]] = []
        self._task: asyncio.Task[None] | None = None

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        self.inline.submit(request, sink)
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())

    def abort(self, request_id: int, sample_index: int | None = None) -> None:
        self.inline.abort(request_id, sample_index)

    async def _run(self) -> None:
        while self.inline.has_work:
            self.inline.step()
            await asyncio.sleep(0)


def ready_for(max_model_len: int) -> Ready:
    return Ready("cpu", "float32", "torch", "2", "tokens-1", 1, 1, 16, max_model_len, 32, 256, ())


class EncodingServer:
    """One checkpoint, served; `running` gives who calls it."""

    def __init__(self, checkpoint: Path, library: Library | None = None) -> None:
        """With `library` the native kernel computes it."""
        spec = read_any_spec(checkpoint)
        assert isinstance(spec, EncoderSpec)
        embedding = read_embedding_spec(checkpoint)
        encoder = load_encoder(checkpoint, spec, device=torch.device("cpu"), dtype=torch.float32)
        dense = DenseModules(checkpoint, embedding, spec.hidden_size) if embedding.dense else None
        model: Encoder | NativeEncoder = encoder
        if library is not None:
            model = NativeEncoder(encoder, library, precision=Precision.FLOAT32, threads=2)
        self.engine = LoopEngine(
            InlineEngine(
                EncoderRunner(model, row_multiple=1 if library else 4, dense=dense),
                EngineLimits(2, 16, spec.max_input_tokens, 32, 256, check_integrity=True),
                clock=time.monotonic,
            )
        )
        ready = ready_for(spec.max_input_tokens)
        self.tokenizer = Tokenizer.from_directory(checkpoint)
        self.model = ServedModel(
            "tiny", spec.architecture, self.tokenizer, None, ready, "abc",
            RequestLimits(
                max_model_len=spec.max_input_tokens, cache_tokens=0, vocab_size=spec.vocab_size,
                max_num_seqs=32, max_num_batched_tokens=256, max_samples=4, max_queued_requests=64,
                max_queued_tokens=10_000, max_message_bytes=1 << 24,
            ),
            spec=spec, embedding=embedding,
            embedding_dimensions=embedding.dimensions(spec.hidden_size),
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncClient]:
        config = ServerConfig(model="m", port=0)
        metrics = Metrics("tiny", methods=all_methods(), codes=STATUS_CODES)
        front = Front(metrics.rejected)
        admission = Admission(64, 10_000, metrics.rejected)
        rpc = RpcServer(config, front, admission, metrics, [])
        self.address = address = await rpc.open()
        front.serve(self.model, self.engine)
        rpc.health.set_engine_state(EngineState.SERVING)
        rpc.health.set_ready(True)
        try:
            async with AsyncClient(address) as client:
                yield client
        finally:
            await rpc.close()
        assert admission.waiting_requests == admission.waiting_tokens == admission.running_sequences == 0
        assert not self.engine.inline.has_work
