"""What a start does for a GPU, or for several ranks: 8 bits, pages, memory, graphs, fixed products."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from salver.model.attention.cpu import GatheringAttention
from salver.model.attention.cuda import CudaAttention
from salver.model.cache import KVCache
from salver.model.errors import CheckpointError
from salver.model.numerics import fixed_rows_hold
from salver.model.quantized import KINDS, quantize_model
from salver.model.spec import ModelSpec
from salver.model.transformer import Transformer
from salver.server.engine.config import EngineConfig
from salver.server.engine.device_memory import CacheMemory, CudaMemory, measure_cache_memory
from salver.server.engine.errors import StartError
from salver.server.engine.graphs import CudaCapture, DecodeGraphs, GraphList
from salver.server.engine.ranks import ParallelTransformer, RankGroup
from salver.server.engine.runner import ModelRunner

BLOCK_SIZE = 16
FIXED_ROWS = 128  # of a product on a GPU: as many as a row of its tiles, and about what its memory is worth


def start_ranks(config: EngineConfig, device: torch.device) -> RankGroup | None:
    """The other ranks; None where there are none. Raises StartError."""
    size = config.tensor_parallel_size
    if size == 1:
        return None
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise StartError(f"--tensor-parallel-size {size}: there are {torch.cuda.device_count()} GPUs here")
    return RankGroup(config, device)


def quantize_weights(config: EngineConfig, model: Transformer) -> None:
    """On a GPU, where torch multiplies 8 bits; on a CPU the native kernel does it when it packs."""
    if model.device.type != "cuda" or config.quantization == "none":
        return
    if config.quantization not in KINDS:
        raise StartError(f"--quantization {config.quantization}: a GPU has {' and '.join(KINDS)}")
    try:
        quantize_model(model, config.quantization)
    except CheckpointError as error:
        raise StartError(str(error)) from error
    torch.cuda.empty_cache()


def make_cache(
    model: Transformer,
    parallel: ParallelTransformer | None,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
) -> KVCache:
    """At every rank."""
    if parallel is not None:
        return parallel.make_cache(num_blocks, block_size)
    return KVCache(model.spec, num_blocks, block_size, dtype=dtype, device=model.device)


def choose_block_size(model: Transformer) -> int:
    """Tokens of a block of the cache. On a GPU, tries the kernels and leaves the model one that works."""
    attention = model.attention
    if not isinstance(attention, CudaAttention):
        return BLOCK_SIZE
    spec, dtype, device = model.spec, model.dtype, model.device
    size = attention.block_size(spec, dtype, device)
    if attention.varlen is None and (trouble := attention.trouble(spec, dtype, device)):
        sys.stderr.write(f"attention in plain torch, for our kernel does not work here: {trouble}\n")
        model.attention = GatheringAttention(exact=attention.exact)
    return size


def free_memory(
    config: EngineConfig,
    model: Transformer,
    parallel: ParallelTransformer | None,
    block_size: int,
    max_num_seqs: int,
    budget_of: Callable[[ModelRunner], int],
) -> CacheMemory:
    """What a GPU has left for the cache, measured with steps in a cache of a null block.

    `budget_of` measures how many tokens its largest step has. Raises StartError.
    """
    cache = make_cache(model, parallel, 2, block_size, model.dtype)
    runner = ModelRunner(parallel or model, cache, block_size=block_size, row_multiple=1)
    try:
        budget = budget_of(runner)
        return measure_cache_memory(
            CudaMemory(model.device),
            lambda: runner.largest_step(budget, max_num_seqs),
            config.gpu_memory_utilization,
        )
    except torch.OutOfMemoryError as error:
        raise StartError(
            f"--max-num-batched-tokens: a step of the largest size does not fit beside the weights: {error}"
        ) from error


def fix_rows(config: EngineConfig, model: Transformer) -> int:
    """On a GPU under --numerics exact: the rows of every product from now on; 0: they may vary."""
    if model.device.type != "cuda" or config.numerics == "fast" or model.spec.latent is not None:
        return 0
    # Sums in an order of a library's own choice.
    if config.quantization == "fp8" or config.tensor_parallel_size > 1:
        return 0
    if not isinstance(model.attention, CudaAttention) or not fixed_rows_hold(model, FIXED_ROWS):
        return 0
    model.fix_rows(FIXED_ROWS)
    return FIXED_ROWS


def decode_graphs(
    config: EngineConfig, runner: ModelRunner, device: str, max_num_seqs: int, max_model_len: int
) -> DecodeGraphs | None:
    """On a GPU (this `device`), where a step never asks the host."""
    model = runner.model
    if not config.cuda_graphs or not isinstance(model, Transformer) or runner.adapters is not None:
        return None
    if not isinstance(model.attention, CudaAttention) or not DecodeGraphs.can_have(model):
        return None
    key = "|".join(map(str, (
        config.weights_digest, device, torch.__version__, model.dtype, config.quantization,
        config.numerics, runner.cache.block_size, max_num_seqs, max_model_len,
    )))  # fmt: skip
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "graphs" / f"{name}.json" if config.cache_dir else None
    return DecodeGraphs(
        model, runner.cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        listed=GraphList(path, key), capture=CudaCapture(),
    )  # fmt: skip


def overlaps(config: EngineConfig, device: torch.device, spec: ModelSpec) -> bool:
    """Steps in flight and guesses exclude each other: a guess needs the last token. On a GPU, guesses come
    only where they were asked for. An encoder-decoder's steps read sources too: one after the other.
    """
    if device.type != "cuda" or spec.encoder is not None:
        return False
    return config.speculation == "off" or config.speculation_chosen
