"""Several processes that compute one model, each a part of every matrix (tensor parallelism).

The worker is rank 0: it schedules, samples and talks to the front as always. It starts the others
(`salver.server.engine.rank`), which do what it does: what a step reads goes to them by a pipe each
(numbers of the host) and by a broadcast (tensors of the device). Where one of them ends, so does the worker,
and the front starts it again; where the worker ends, their pipes close and they end too.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from salver.model.attention import AttentionBatch
from salver.model.cache import KVCache
from salver.model.parallel import Ranks
from salver.model.spec import ModelSpec
from salver.model.transformer import OnAttention, Transformer
from salver.server.engine.config import EngineConfig
from salver.server.engine.rank_messages import write_message

_RANK_ENDED = 70  # the worker's exit code then (EX_SOFTWARE)


@dataclass(frozen=True, slots=True)
class MakeCache:
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class PadExperts:
    row_multiple: int


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward pass; token ids, positions, slots and tables follow as one broadcast."""

    cu_seqlens_q: list[int]
    seq_lens: list[int]
    prompt_lens: list[int]
    num_rows: int
    table_width: int


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of so many rows of hidden states, which follow as a broadcast."""

    num_rows: int


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    pairs: list[tuple[int, int]]


Command = MakeCache | PadExperts | Forward | Logits | CopyBlocks


def join(rank: int, size: int, store: str, device: torch.device) -> Ranks:
    """Meets the other ranks. Reductions and gathers by NCCL between GPUs, by Gloo between CPUs."""
    # They are all on this machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)

    def reduce(x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    return Ranks(rank, size, reduce, gather)


class RankGroup:
    """The other ranks, seen from rank 0."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        """Starts them and waits until all have met; they load their parts meanwhile we load ours."""
        self.size = config.tensor_parallel_size
        self._folder = tempfile.TemporaryDirectory(prefix="salver-ranks-")
        store = str(Path(self._folder.name) / "store")
        self._processes = []
        for rank in range(1, self.size):
            command = [
                sys.executable,
                "-m",
                "salver.server.engine.rank",
                "--rank",
                str(rank),
                "--store",
                store,
            ]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True, name="rank").start()
        self.send(config)
        self.ranks = join(0, self.size, store, device)

    def send(self, message: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            write_message(process.stdin, message)

    @staticmethod
    def _watch(process: subprocess.Popen[bytes]) -> None:
        """Without one of its ranks the worker would wait for ever."""
        code = process.wait()
        sys.stderr.write(f"rank process {process.pid} ended with exit code {code}; the worker ends too\n")
        sys.stderr.flush()
        os._exit(_RANK_ENDED)


class RanksDiverged(Exception):
    """The ranks no longer compute the same step."""


class ParallelCache(KVCache):
    """Rank 0's part of the cache; tells the others what is done with its blocks."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device,
        send: Callable[[object], None],
    ) -> None:  # fmt: skip
        super().__init__(spec, num_blocks, block_size, dtype=dtype, device=device)
        self._send = send
        send(MakeCache(num_blocks, block_size))

    def copy_blocks(self, pairs: Any) -> None:
        if pairs:
            self._send(CopyBlocks(list(pairs)))
            super().copy_blocks(pairs)


class ParallelTransformer:
    """Rank 0's part of a model as a `Decoder`: before it computes, the others are told to.

    A step that fails here, for want of memory too, leaves the others waiting in it: RanksDiverged then, which
    ends the worker.
    """

    @classmethod
    def of(cls, model: Transformer, group: RankGroup) -> ParallelTransformer:
        """Of a model that was loaded with the group's ranks."""
        shapes = {tensor.name: tensor.shape for tensor in model.loaded}  # of the whole parameters
        return cls(model, group, sum(map(math.prod, shapes.values())), shapes["embed.weight"][0])

    def __init__(self, model: Transformer, group: RankGroup, num_parameters: int, vocab_size: int) -> None:
        """`num_parameters` and `vocab_size` are those of the whole model."""
        self._model = model
        self._group = group
        self._num_parameters = num_parameters
        self.spec = replace(model.spec, vocab_size=vocab_size)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
        on_attention: OnAttention | None = None,
    ) -> Tensor:
        tables = attention.block_tables
        self._group.send(
            Forward(
                attention.cu_seqlens_q,
                attention.seq_lens,
                attention.prompt_lens,
                len(token_ids),
                tables.shape[1],
            )
        )
        try:
            dist.broadcast(torch.cat((token_ids, positions, attention.slot_mapping, tables.flatten())), 0)
            hidden: Tensor = self._model(token_ids, positions, cache, attention, on_layer, on_attention)
            return hidden
        except (RuntimeError, MemoryError) as error:
            raise RanksDiverged(f"a step failed at rank 0 alone: {type(error).__name__}") from error

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        self._group.send(Logits(len(hidden)))
        try:
            dist.broadcast(hidden, 0)
            logits: Tensor = self._model.logits(hidden)
            return logits
        except (RuntimeError, MemoryError) as error:
            raise RanksDiverged(f"logits failed at rank 0 alone: {type(error).__name__}") from error

    def make_cache(self, num_blocks: int, block_size: int) -> ParallelCache:
        """At every rank."""
        model = self._model
        return ParallelCache(
            model.spec, num_blocks, block_size, dtype=model.dtype, device=model.device, send=self._group.send
        )

    def num_parameters(self) -> int:
        return self._num_parameters

    def stored(self) -> list[Tensor]:
        """Of this rank."""
        return self._model.stored()


class Follower:
    """Another rank: does what it is told."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._cache: KVCache | None = None

    @torch.inference_mode()
    def follow(self, command: Command) -> None:
        model, cache = self._model, self._cache
        match command:
            case PadExperts(multiple):
                model.pad_experts(multiple)
            case MakeCache(num_blocks, block_size):
                self._cache = None  # the memory of the old one first
                self._cache = KVCache(
                    model.spec, num_blocks, block_size, dtype=model.dtype, device=model.device
                )
            case CopyBlocks(pairs):
                assert cache is not None
                cache.copy_blocks(pairs)
            case Forward(bounds, lengths, prompts, rows, width):
                assert cache is not None
                sizes = [rows, rows, rows, len(lengths) * width]
                packed = torch.empty(sum(sizes), dtype=torch.int64, device=model.device)
                dist.broadcast(packed, 0)
                token_ids, positions, slots, tables = torch.split(packed, sizes)
                batch = AttentionBatch(bounds, lengths, tables.view(len(lengths), width), slots, prompts)
                model(token_ids, positions, cache, batch)
            case Logits(rows):
                shape = (rows, model.spec.hidden_size)
                hidden = torch.empty(shape, dtype=model.dtype, device=model.device)
                dist.broadcast(hidden, 0)
                model.logits(hidden)
