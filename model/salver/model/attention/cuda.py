"""Attention on a GPU: torch's FlashAttention where it can, else our Triton kernel.

`torch.nn.attention.varlen` reads a paged cache in place, but knows no ALiBi, no soft cap, no sinks and no
latents, and its pages have a multiple of 256 tokens. Whether it works here is tried once, at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as cached
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..spec import AlibiPositions, ModelSpec
from .batch import AttentionBatch
from .reference import ReferenceAttention
from .scoring import Scoring

VARLEN_PAGE = 256  # FlashAttention 2 takes no smaller pages
SMALL_PAGE = 16
VARLEN_HEAD_DIM = 256  # at most, and a multiple of 8
TOLERANCE = 0.02  # of values around 1, in half precision


Attend = Callable[[Tensor, KVCache, int, AttentionBatch, Scoring], Tensor]


class CudaAttention:
    """`exact`: a row's bits do not depend on what else is in the step."""

    reads_stale = False  # what is masked is not loaded

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        self.varlen: Any = None  # torch's function, once it has been tried and is right

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        if self.varlen is not None and cache.block_size % VARLEN_PAGE == 0 and scoring.plain:
            return self._varlen(query, cache, layer, batch, scoring)
        return self._paged(query, cache, layer, batch, scoring)

    def _paged(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        from .paged_kernel import paged_attention, queries_of, tile_of

        few = not self.exact and batch.cu_seqlens_q[-1] == len(batch.seq_lens)
        tile = tile_of(query.shape[2], query.element_size(), few_queries=few)
        queries = queries_of(tile, query.shape[1] // cache.num_kv_heads)
        tiles = batch.derive(_planner(queries))
        return paged_attention(query, cache, layer, batch, scoring, tiles, tile)

    def _varlen(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        plan = batch.derive(_varlen_plan)
        count = batch.num_tokens
        out: Tensor = self.varlen(
            query[:count],
            cache.keys(layer),
            cache.values(layer),
            plan.starts,
            plan.key_starts,
            plan.most_queries,
            batch.block_tables.shape[1] * cache.block_size,
            scale=scoring.scale,
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
            enable_gqa=query.shape[1] != cache.num_kv_heads,
            seqused_k=plan.lengths,
            block_table=plan.tables,
            num_splits=1 if self.exact else None,
        )
        out = out.flatten(1)
        if count == len(query):
            return out
        return torch.cat((out, out.new_zeros((len(query) - count, out.shape[1]))))

    def block_size(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> int:
        """Of the cache: large pages where torch's kernel can compute every layer and is right here."""
        self.varlen = None
        if not _is_plain(spec) or dtype == torch.float32:
            return SMALL_PAGE
        from torch.nn.attention import varlen

        self.varlen = varlen.varlen_attn
        if self._trouble(self._varlen, VARLEN_PAGE, spec, dtype, device):
            self.varlen = None
        return SMALL_PAGE if self.varlen is None else VARLEN_PAGE

    def trouble(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str:
        """Why our own kernel cannot be used here; empty where it runs and is right."""
        return self._trouble(self._paged, SMALL_PAGE, spec, dtype, device)

    @staticmethod
    def _trouble(attend: Attend, page: int, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str:
        """What keeps a kernel from giving what the reference gives, for a prompt, a chunk and a decode."""
        sizes: Any = SimpleNamespace(
            num_layers=1, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
        )
        generator = torch.Generator().manual_seed(0)
        cache = KVCache(sizes, 5, page, dtype=dtype, device=device)
        cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
        query = torch.randn((31, spec.num_heads, spec.head_dim), generator=generator).to(device, dtype)
        tables = torch.tensor([[3, 1], [2, 0], [4, 0]], device=device)
        lengths = [page + min(44, page - 1), 10, page - 3]
        batch = AttentionBatch([0, 20, 30, 31], lengths, tables, torch.zeros(31, device=device))
        for window in {None, *spec.windows}:
            scoring = Scoring(spec.attention_scale, window)
            expected = ReferenceAttention()(query, cache, 0, batch, scoring).float()
            try:
                found = attend(query, cache, 0, batch, scoring).float()
            except Exception as error:  # a compiler's too: this torch, Triton or GPU has none of it
                return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not bool(((found - expected).abs() < TOLERANCE).all()):
                return f"it differs from the reference by {float((found - expected).abs().max()):.2g}"
        return ""


def _is_plain(spec: ModelSpec) -> bool:
    """Whether torch's kernel knows how every layer scores."""
    if spec.latent is not None or spec.sinks or spec.score_cap or isinstance(spec.positions, AlibiPositions):
        return False
    return spec.head_dim <= VARLEN_HEAD_DIM and spec.head_dim % 8 == 0


def _varlen_plan(batch: AttentionBatch) -> SimpleNamespace:
    """What torch's kernel wants to know of a step, in int32."""
    starts, lengths = batch.on_device()
    bounds = batch.cu_seqlens_q
    key_starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return SimpleNamespace(
        starts=starts.int(),
        key_starts=key_starts.int(),
        lengths=lengths.int(),
        tables=batch.block_tables.int(),
        most_queries=max(end - begin for begin, end in pairwise(bounds)),
    )


@cached
def _planner(queries: int) -> Callable[[AttentionBatch], Tensor]:
    """The same for so many queries in a tile: `AttentionBatch.derive` knows plans by who makes them."""
    from .paged_kernel import query_tiles

    return partial(query_tiles, queries=queries)
