"""The attention that serves agrees with its definition, in steps of every mixture."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from salver.model.attention import Alibi, AttentionBatch, Scoring, choose
from salver.model.attention.reference import ReferenceAttention
from salver.model.cache import KVCache
from salver.model.spec import ModelSpec

CPU = torch.device("cpu")
BLOCK_SIZE, HEAD_DIM = 8, 16
MIXTURES: dict[str, list[tuple[int, int]]] = {  # (keys, of them queries)
    "equal lengths": [(24, 1)] * 5,
    "similar lengths": [(100, 1), (90, 1), (97, 1), (104, 1)],
    "very different lengths": [(3, 1), (700, 1), (1, 1), (70, 1), (650, 1), (9, 1)],
    "whole prompts": [(33, 33), (5, 5), (300, 300)],
    "chunks": [(40, 7), (260, 130), (300, 2)],
    "all of it": [(12, 1), (40, 7), (500, 1), (33, 33), (90, 1), (88, 1)],
    "one": [(1, 1)],
}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.3, 0.2])  # of six heads
SCORINGS: dict[str, Scoring] = {
    "a short window": Scoring(0.3, window=5),
    "a window of some blocks": Scoring(0.3, window=37),
    "a wide window": Scoring(0.3, window=400),
    "cap": Scoring(0.9, cap=2.0),
    "alibi": Scoring(0.3, alibi=Alibi(SLOPES)),
    "rounded alibi": Scoring(0.3, alibi=Alibi(SLOPES, 0.5, rounded=True)),
    "sinks": Scoring(0.3, sinks=SLOPES * 4),
    "everything": Scoring(0.9, window=37, cap=2.0, alibi=Alibi(SLOPES / 8), sinks=SLOPES),
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def spec(heads: int, kv_heads: int) -> ModelSpec:
    sizes: Any = SimpleNamespace(num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM)
    return cast(ModelSpec, sizes)


def make_step(
    mixture: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype, padding: int
) -> tuple[torch.Tensor, KVCache, AttentionBatch]:
    """Queries, a cache of random contents (garbage past each end), the batch."""
    torch.manual_seed(0)
    needed = [-(-keys // BLOCK_SIZE) for keys, _ in mixture]
    cache = KVCache(spec(*heads), sum(needed) + 1, BLOCK_SIZE, dtype=dtype, device=CPU)
    cache.data.normal_()
    blocks = list(range(1, sum(needed) + 1))
    random.Random(0).shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    bounds = [0]
    slots: list[int] = []
    for (keys, queries), table in zip(mixture, tables, strict=True):
        bounds.append(bounds[-1] + queries)
        slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(keys - queries, keys)]
    batch = AttentionBatch(
        bounds,
        [keys for keys, _ in mixture],
        torch.tensor([table + [0] * (max(needed) - len(table)) for table in tables]),
        torch.tensor(slots + [0] * padding),
    )
    return torch.randn(bounds[-1] + padding, heads[0], HEAD_DIM).to(dtype), cache, batch


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_agrees_with_the_reference(mixture: str, dtype: torch.dtype, numerics: str) -> None:
    for heads, padding in (((6, 2), 0), ((4, 4), 3), ((3, 1), 1)):
        query, cache, batch = make_step(MIXTURES[mixture], heads, dtype, padding)
        expected = ReferenceAttention()(query, cache, 1, batch, Scoring(0.3))
        found = choose(CPU, numerics, dtype)(query, cache, 1, batch, Scoring(0.3))
        assert found.shape == expected.shape == (query.shape[0], heads[0] * HEAD_DIM)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_every_scoring(kind: str, dtype: torch.dtype, numerics: str) -> None:
    plain = Scoring(SCORINGS[kind].scale)
    for mixture, padding in (("all of it", 0), ("chunks", 2), ("equal lengths", 0), ("similar lengths", 1)):
        query, cache, batch = make_step(MIXTURES[mixture], (6, 2), dtype, padding)
        expected = ReferenceAttention()(query, cache, 1, batch, SCORINGS[kind])
        found = choose(CPU, numerics, dtype)(query, cache, 1, batch, SCORINGS[kind])
        torch.testing.assert_close(found.float(), expected.float(), atol=TOLERANCES[dtype], rtol=0)
        if mixture == "all of it":
            without = ReferenceAttention()(query, cache, 1, batch, plain)
            assert float((without - expected).abs().max()) > 2 * TOLERANCES[dtype], "no difference to see"


@pytest.mark.parametrize("scoring", [Scoring(0.25), *SCORINGS.values()], ids=["plain", *SCORINGS])
def test_exact_float32_does_not_depend_on_the_company(scoring: Scoring) -> None:
    """Bit for bit: the last row alone, among others, and as the end of a chunk."""
    query, cache, batch = make_step(MIXTURES["all of it"], (6, 2), torch.float32, 0)
    attention = choose(CPU, "exact", torch.float32)
    together = attention(query, cache, 0, batch, scoring)
    for sequence, keys in enumerate(batch.seq_lens):
        last = batch.cu_seqlens_q[sequence + 1] - 1
        alone = AttentionBatch(
            [0, 1],
            [keys],
            batch.block_tables[sequence : sequence + 1],
            batch.slot_mapping[last : last + 1],
        )
        assert torch.equal(attention(query[last : last + 1], cache, 0, alone, scoring)[0], together[last])


def test_a_nan_stays_with_its_sequence() -> None:
    """Not even through a block that is used again, or through the null block."""
    query, cache, batch = make_step([(9, 1), (20, 1), (30, 30)], (6, 2), torch.float32, 2)
    cache.data.fill_(float("nan"))
    cache.data[:, [*batch.block_tables[0, :1].tolist(), *batch.block_tables[1, :3].tolist()]] = 1.0
    cache.begin_step(batch)
    rows = torch.ones(query.shape[0], 2, HEAD_DIM)
    for layer in range(2):
        cache.write(layer, rows, rows, batch)
        assert bool(
            torch.isfinite(
                choose(CPU, "exact", torch.float32)(query, cache, layer, batch, Scoring(0.25))
            ).all()
        )


def test_copied_blocks() -> None:
    cache = KVCache(spec(2, 1), 6, BLOCK_SIZE, dtype=torch.float32, device=CPU)
    cache.data.normal_()
    before = cache.data.clone()
    cache.copy_blocks([(1, 4), (2, 5)])
    cache.copy_blocks([])
    assert torch.equal(cache.data[:, [0, 1, 2, 3, 4, 5]], before[:, [0, 1, 2, 3, 1, 2]])
    assert KVCache.bytes_per_block(spec_with_sizes(), BLOCK_SIZE, torch.bfloat16) == 2 * 3 * 2 * 16 * 8 * 2


def spec_with_sizes() -> ModelSpec:
    sizes: Any = SimpleNamespace(num_layers=3, num_kv_heads=2, head_dim=16)
    sizes.kv_bytes_per_token = lambda bytes_per_value: ModelSpec.kv_bytes_per_token(sizes, bytes_per_value)
    return cast(ModelSpec, sizes)
