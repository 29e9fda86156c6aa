"""Models of published shapes with random weights, on the engine's own path, for `gpu.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from salver.model.attention import choose
from salver.model.attention.cuda import CudaAttention
from salver.model.cache import KVCache
from salver.model.numerics import fixed_rows_hold, row_multiple
from salver.model.spec import HeadNorm, ModelSpec, NormSpec, RopePositions
from salver.model.transformer import Transformer
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.device_startup import FIXED_ROWS, choose_block_size
from salver.server.engine.graphs import CudaCapture, DecodeGraphs, GraphList
from salver.server.engine.launching import LaunchingModelRunner
from salver.server.engine.overlap import OverlappedCore
from salver.server.engine.request import EngineRequest, SamplingParams, StepStats, StoppingParams

RMS = NormSpec("rms", 1e-6)


def _llama(
    name: str, vocab: int, hidden: int, layers: int, heads: tuple[int, int, int], inner: int, tied: bool,
    theta: float = 500000.0,
) -> ModelSpec:  # fmt: skip
    """`heads`: of queries, of keys, and the size of one."""
    return ModelSpec(
        name, vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads[0],
        num_kv_heads=heads[1], head_dim=heads[2], intermediate_size=inner, max_position_embeddings=32768,
        norm=RMS, positions=RopePositions(theta), activation="silu", gated=True, qkv_bias=False,
        attention_out_bias=False, mlp_bias=False, tied_head=tied,
    )  # fmt: skip


# As in the config.json of Qwen3-0.6B, Llama-3.2-1B (but for its rope's scaling) and Llama-3.1-8B (likewise).
SHAPES = {
    "0.6B": replace(
        _llama("Qwen3-0.6B", 151936, 1024, 28, (16, 8, 128), 3072, True, 1e6), head_norm=HeadNorm(RMS, "head")
    ),
    "1B": _llama("Llama-3.2-1B", 128256, 2048, 16, (32, 8, 64), 8192, True),
    "8B": _llama("Llama-3.1-8B", 128256, 4096, 32, (32, 8, 128), 14336, False),
    "tiny": _llama("tiny", 256, 64, 2, (4, 2, 16), 128, True),
}


@torch.inference_mode()
def random_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, numerics: str) -> Transformer:
    """Norms of ones, everything else small and normal, as an untrained model has it."""
    with torch.device("meta"):
        model = Transformer(spec, choose(device, numerics, dtype))
    model.eval()
    model.place(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if "norm" in name:
            value.fill_(1.0)
        else:
            value.normal_(0.0, 0.02, generator=generator)
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, torch.nn.Parameter(value, requires_grad=False))
    return model


@dataclass
class Done:
    """What came of some requests."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)  # of each token, seconds
    seconds: float = 0.0
    steps: list[StepStats] = field(default_factory=list)

    @property
    def outside(self) -> float:
        """Share of the steps that was not the model."""
        duration = sum(step.duration for step in self.steps)
        return 1 - sum(step.model_duration for step in self.steps) / duration if duration else 0.0


class Engine:
    """A model, its cache and a core that is stepped here."""

    def __init__(
        self, model: Transformer, *, exact: bool, cache_bytes: int, max_num_seqs: int = 256,
        max_model_len: int = 2304, budget: int = 8192, graphs: bool = True, overlapped: bool = True,
    ) -> None:  # fmt: skip
        device = model.device
        block_size = choose_block_size(model)
        on_gpu = device.type == "cuda"
        # Without fixed tiles neither the same tokens nor the price of them could be shown.
        self.fixed = exact and on_gpu and fixed_rows_hold(model, FIXED_ROWS)
        model.fix_rows(FIXED_ROWS if self.fixed else 0)
        per_block = KVCache.bytes_per_block(model.spec, block_size, model.dtype)
        most = max_num_seqs * (-(-max_model_len // block_size) + 1)
        blocks = min(cache_bytes // per_block, most)
        cache = KVCache(model.spec, blocks, block_size, dtype=model.dtype, device=device)
        multiple = 1 if on_gpu or not exact else row_multiple(model)
        runner = LaunchingModelRunner(model, cache, block_size=block_size, row_multiple=multiple)
        if graphs and on_gpu and isinstance(model.attention, CudaAttention):
            runner.graphs = DecodeGraphs(
                model, cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
                listed=GraphList(None, ""), capture=CudaCapture(),
            )  # fmt: skip
        limits = EngineLimits(
            blocks, block_size, max_model_len, max_num_seqs, budget, enable_prefix_caching=False
        )
        core = OverlappedCore if overlapped else EngineCore
        self.core = core(runner, limits, clock=time.perf_counter)
        self.block_size = block_size
        self._number = 0

    def request(self, prompt: Sequence[int], max_tokens: int, temperature: float = 0.0) -> EngineRequest:
        self._number += 1
        sampling = SamplingParams(temperature=temperature, seed=len(prompt))
        return EngineRequest(
            self._number, tuple(prompt), sampling, StoppingParams(max_tokens), arrival=time.perf_counter()
        )

    def run(
        self, requests: Sequence[EngineRequest], later: Sequence[tuple[float, EngineRequest]] = ()
    ) -> Done:
        """Until all have ended; those of `later` come so many seconds after the begin."""
        done, waiting = Done(), sorted(later, key=lambda pair: pair[0])
        begin = time.perf_counter()
        for request in requests:
            self.core.add(request)
        while self.core.has_work or waiting:
            while waiting and time.perf_counter() - begin >= waiting[0][0]:
                self.core.add(waiting.pop(0)[1])
            message = self.core.step()
            if message is None:
                continue
            now = time.perf_counter()
            for output in message.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                done.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                done.times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
            if message.stats is not None:
                done.steps.append(message.stats)
        done.seconds = time.perf_counter() - begin
        return done


def weight_bytes(model: Transformer) -> int:
    """That a decode step reads: all but the table of embeddings, unless it is the head too."""
    table = 0 if model.spec.tied_head else model.embed.weight.nbytes
    return sum(tensor.nbytes for tensor in model.stored()) - table


def free_bytes(device: torch.device, share: float = 0.85) -> int:
    """For a cache."""
    if device.type != "cuda":
        return 64 << 20
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0] * share)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values, the one at this share of them."""
    ordered: list[Any] = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
