"""InspectionService of a decoder over a real port, in this process. Small steps cut prompts."""

from __future__ import annotations

import time
from pathlib import Path

from support.encoding_service import EncodingServer, LoopEngine, ready_for
from support.exactness import BLOCK_SIZE, BLOCKS, runner_of

from salver.model.embedding_spec import read_embedding_spec
from salver.model.kernels.library import Library
from salver.model.tokenizer import Tokenizer
from salver.server.engine.core import EngineLimits
from salver.server.engine.inline import InlineEngine
from salver.server.rpc.served import RequestLimits, ServedModel

STEP_TOKENS = 24


class DecoderServer(EncodingServer):
    """A decoder, or an encoder-decoder, in the place of the encoder."""

    def __init__(self, checkpoint: Path, library: Library | None = None) -> None:
        self.runner = runner_of(checkpoint, "float32", library)
        spec = self.runner.model.spec
        context = spec.max_position_embeddings
        source = 0 if spec.encoder is None else spec.encoder.max_input_tokens
        limits = EngineLimits(
            BLOCKS, BLOCK_SIZE, context, 16, STEP_TOKENS, max_source_len=source, check_integrity=True
        )
        self.engine = LoopEngine(InlineEngine(self.runner, limits, clock=time.monotonic))
        self.tokenizer = Tokenizer.from_directory(checkpoint)
        self.model = ServedModel(
            "tiny", spec.architecture, self.tokenizer, None, ready_for(context), "abc",
            RequestLimits(
                max_model_len=context, cache_tokens=(BLOCKS - 1) * BLOCK_SIZE, vocab_size=spec.vocab_size,
                max_num_seqs=16, max_num_batched_tokens=STEP_TOKENS, max_samples=16,
                max_queued_requests=64, max_queued_tokens=10_000, max_message_bytes=1 << 20,
            ),
            embedding=read_embedding_spec(checkpoint), embedding_dimensions=spec.hidden_size,
            spec=spec,
        )  # fmt: skip
