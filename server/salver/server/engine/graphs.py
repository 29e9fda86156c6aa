"""Decode steps as CUDA graphs: hundreds of launches become one.

A graph is of one number of sequences, so there is one for each of a few sizes, and a step takes the next
larger one; what is left of it computes the null block. A graph is captured when a step first wants it, and
listed in a file, so that the next start captures it before anybody waits.
"""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from salver.model.attention import AttentionBatch
from salver.model.cache import KVCache
from salver.model.transformer import Transformer
from salver.server.engine.batch import Batch

WARM_UP_RUNS = 2  # before a capture: kernels are compiled and libraries make their workspaces
FINE_UP_TO = 8  # sizes are powers of two up to here,
MEDIUM_UP_TO, MEDIUM = 128, 8  # multiples of this up to there,
COARSE = 32  # and of this beyond


class Capture(Protocol):
    """Makes a replay out of a computation that reads and writes the same memory at every call."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]: ...


class CudaCapture:
    """All graphs in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: object = None

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
            compute()
        if self._pool is None:
            self._pool = graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of sequences that have a graph, rising, the last of them `max_num_seqs`.

    A size wastes at most half of a step of few sequences, and less of larger ones.
    """
    powers = [1 << i for i in range(FINE_UP_TO.bit_length())]
    sizes = [*powers, *range(FINE_UP_TO + MEDIUM, MEDIUM_UP_TO + 1, MEDIUM)]
    sizes += range(MEDIUM_UP_TO + COARSE, max_num_seqs + 1, COARSE)
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


class GraphList:
    """The file with the sizes that were captured here. Lost or damaged it costs time alone."""

    def __init__(self, path: Path | None, key: str) -> None:
        """`key` names all that the sizes are good for; a list under another name is dropped."""
        self._path = path
        self._key = key
        self.sizes = self._read()

    def _read(self) -> list[int]:
        if self._path is None:
            return []
        try:
            found = json.loads(self._path.read_text())
            sizes = found["sizes"] if found["key"] == self._key else []
            return sorted({size for size in sizes if isinstance(size, int)})
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def add(self, size: int) -> None:
        if size in self.sizes:
            return
        self.sizes = sorted([*self.sizes, size])
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"key": self._key, "sizes": self.sizes}))
            part.replace(self._path)
        except OSError:  # a full or read-only disk: the next start captures later
            return


@dataclass(slots=True)
class _Graph:
    """The memory that a graph reads and writes, and how it is run."""

    token_ids: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]
    slots: Tensor  # int64 [B]
    lengths: Tensor  # int64 [B]
    tables: Tensor  # int64 [B, max_blocks]
    hidden: Tensor  # [B, hidden_size]
    replay: Callable[[], None]


class DecodeGraphs:
    """Runs steps in which every sequence computes one token."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        listed: GraphList,
        capture: Capture,
    ) -> None:
        """Captures the sizes that are listed. The attention must read lengths and tables on the device."""
        self._model = model
        self._cache = cache
        self._sizes = graph_sizes(max_num_seqs)
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._listed = listed
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}
        self._broken = False
        # The largest first: its memory serves the others.
        for size in reversed([size for size in listed.sizes if size in self._sizes]):
            self._capture_size(size)

    @property
    def captured(self) -> tuple[int, ...]:
        """Sizes that have a graph now, rising."""
        return tuple(sorted(self._graphs))

    @staticmethod
    def can_have(model: Transformer) -> bool:
        """Whether its step never asks the host. Experts do (which of them have tokens), and so do positions
        that depend on the length of a prompt.
        """
        spec = model.spec
        return spec.experts is None and spec.encoder is None and not spec.rope_context[1]

    def run(self, batch: Batch) -> Tensor | None:
        """The hidden states [S, hidden_size] of S sequences, good until the next step.

        None for a step that no graph computes: with prompts, with too many sequences.
        """
        attention = batch.attention
        count = len(attention.seq_lens)
        place = bisect_left(self._sizes, count)
        if attention.num_tokens != count or place == len(self._sizes):
            return None
        size = self._sizes[place]
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._capture_size(size)
            if graph is None:
                return None
            self._listed.add(size)
        _, lengths = attention.on_device()
        self._fill(graph, batch, lengths)
        graph.replay()
        return graph.hidden[:count]

    @staticmethod
    def _fill(graph: _Graph, batch: Batch, lengths: Tensor) -> None:
        """What is behind the step's sequences computes a first token in the null block."""
        attention = batch.attention
        count = len(attention.seq_lens)
        for static, values, rest in (
            (graph.token_ids, batch.token_ids, 0),
            (graph.positions, batch.positions, 0),
            (graph.slots, attention.slot_mapping, 0),
            (graph.lengths, lengths, 1),
        ):
            static[:count].copy_(values[:count])
            static[count:].fill_(rest)
        width = attention.block_tables.shape[1]
        graph.tables[:count, :width].copy_(attention.block_tables)
        graph.tables[count:, :1].fill_(0)

    def _capture_size(self, size: int) -> _Graph | None:
        """None, and none ever after, where a capture fails: steps are launched kernel by kernel then."""
        if self._broken:
            return None
        try:
            graph = self._graphs[size] = self._make(size)
        except RuntimeError as error:
            self._broken = True
            sys.stderr.write(f"no CUDA graphs: the capture of {size} sequences failed: {error}\n")
            return None
        return graph

    def _make(self, size: int) -> _Graph:
        model, device = self._model, self._model.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        starts = torch.arange(size + 1, device=device)
        hidden = torch.zeros((size, model.spec.hidden_size), dtype=model.dtype, device=device)
        graph = _Graph(
            zeros(size), zeros(size), zeros(size), zeros(size) + 1, zeros(size, self._max_blocks), hidden,
            replay=lambda: None,
        )  # fmt: skip

        def compute() -> None:
            # A new one at each call: what is derived of it is computed by the graph too.
            attention = AttentionBatch(
                cu_seqlens_q=list(range(size + 1)),
                seq_lens=[1] * size,
                block_tables=graph.tables,
                slot_mapping=graph.slots,
                query_starts=starts,
                lengths=graph.lengths,
            )
            graph.hidden.copy_(model(graph.token_ids, graph.positions, self._cache, attention))

        graph.replay = self._capture(compute)
        return graph
