"""How large an engine's cache, contexts and steps are, where no flag says so."""

from __future__ import annotations

import torch

from salver.model.cache import KVCache
from salver.model.spec import ModelSpec
from salver.model.transformer import Transformer
from salver.server.engine.config import EngineConfig
from salver.server.engine.device_startup import free_memory
from salver.server.engine.errors import StartError
from salver.server.engine.ranks import ParallelTransformer
from salver.server.engine.runner import ModelRunner

DEFAULT_NUM_SEQS = {"cpu": 32, "cuda": 256}
CPU_CACHE_BYTES = 192 << 20  # at least, and enough for one whole context
STEP_SECONDS = 0.25  # about what one step may take, so that nobody's stream stalls for longer
WARM_UP_TOKENS = 128
WARM_UP_RUNS = 2


def max_model_len_of(config: EngineConfig, spec: ModelSpec) -> int:
    context = spec.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > context:
        raise StartError(f"--max-model-len {config.max_model_len}: the checkpoint's context is {context}")
    return config.max_model_len or context


def num_blocks_of(
    config: EngineConfig,
    model: Transformer,
    parallel: ParallelTransformer | None,
    draft: Transformer | None,
    dtype: torch.dtype,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
) -> int:
    """Blocks that fit in the cache's memory, the null block among them; unasked, no more than can be used."""
    spec = model.spec
    per_block = KVCache.bytes_per_block(spec, block_size, dtype)
    source = 0 if spec.encoder is None else -(-spec.encoder.max_input_tokens // block_size)
    whole_context = (-(-max_model_len // block_size) + 1 + source) * per_block
    most = max_num_seqs * whole_context
    if config.kv_cache_memory is not None:
        memory = config.kv_cache_memory
    elif model.device.type == "cuda":
        # A draft model's cache has as many blocks.
        drafts = 0 if draft is None else KVCache.bytes_per_block(draft.spec, block_size, draft.dtype)

        def budget_of(runner: ModelRunner) -> int:
            return config.max_num_batched_tokens or token_budget(
                speed_of(runner, max_model_len)[0], max_num_seqs
            )

        found = free_memory(config, model, parallel, block_size, max_num_seqs, budget_of)
        if found.cache < 2 * (per_block + drafts):
            raise StartError(f"--gpu-memory-utilization: nothing is left for the key-value cache: {found}")
        memory = min(found.cache // (per_block + drafts) * per_block, most)
    else:
        memory = max(min(CPU_CACHE_BYTES, most), whole_context)
    blocks = memory // per_block
    if blocks < 2:
        raise StartError(
            f"--kv-cache-memory {memory}: two blocks of {block_size} tokens take {2 * per_block} bytes"
        )
    return int(blocks)


def speed_of(runner: ModelRunner, max_model_len: int) -> tuple[float, float]:
    """Tokens a second of a prompt, and of steps of one token.

    The best of some short runs: what else the machine does only ever makes one slower.
    """
    length = min(WARM_UP_TOKENS, max_model_len)
    many = max(runner.measure_prefill(length) for _ in range(WARM_UP_RUNS))
    one = max(runner.measure_prefill(1) for _ in range(3 * WARM_UP_RUNS))  # short, so easily disturbed
    return many, one


def token_budget(speed: float, max_num_seqs: int) -> int:
    """Tokens of a step that takes about STEP_SECONDS at so many a second."""
    budget = int(speed * STEP_SECONDS) // 64 * 64
    return max(128, max_num_seqs, min(budget, 8192))
