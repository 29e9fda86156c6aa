"""The Triton kernel agrees with the definition of attention, and a row's bits don't depend on its step.

In Triton's interpreter without a GPU, where a tile's products are numpy's; on one, compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.test_attention import BLOCK_SIZE, CPU, HEAD_DIM, MIXTURES, SCORINGS, make_step, spec

from salver.model.attention import Alibi, AttentionBatch, Scoring
from salver.model.attention.cuda import CudaAttention
from salver.model.attention.reference import ReferenceAttention
from salver.model.cache import KVCache

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.triton
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHORT = {name: mixture for name, mixture in MIXTURES.items() if max(keys for keys, _ in mixture) <= 300}


def moved(query: torch.Tensor, cache: KVCache, batch: AttentionBatch) -> tuple[Any, KVCache, AttentionBatch]:
    """On the device."""
    cache.data = cache.data.to(DEVICE)
    tables, slots = batch.block_tables.to(DEVICE), batch.slot_mapping.to(DEVICE)
    return query.to(DEVICE), cache, AttentionBatch(batch.cu_seqlens_q, batch.seq_lens, tables, slots)


def check(
    query: torch.Tensor, cache: KVCache, batch: AttentionBatch, scoring: Scoring, exact: bool = True
) -> None:
    query, cache, batch = moved(query, cache, batch)
    alibi, sinks = scoring.alibi, scoring.sinks
    scoring = replace(
        scoring,
        alibi=None if alibi is None else replace(alibi, slopes=alibi.slopes.to(DEVICE)),
        sinks=None if sinks is None else sinks.to(DEVICE),
    )
    expected = ReferenceAttention()(query, cache, 1, batch, scoring)
    found = CudaAttention(exact=exact)(query, cache, 1, batch, scoring)
    assert found.shape == expected.shape and found.dtype == query.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[query.dtype])


@pytest.mark.parametrize("mixture", SHORT)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_agrees_with_the_reference(mixture: str, dtype: torch.dtype) -> None:
    for heads, padding in (((6, 2), 0), ((4, 4), 3), ((3, 1), 1)):
        check(*make_step(MIXTURES[mixture], heads, dtype, padding), Scoring(0.3), exact=heads != (4, 4))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("mixture", ["chunks", "similar lengths", "one"])
def test_agrees_with_the_reference_however_scores_are_made(scoring: str, mixture: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(*make_step(MIXTURES[mixture], (6, 2), dtype, 2), SCORINGS[scoring])


@pytest.mark.parametrize("head_dim", [12, 80, 96, 576])
@pytest.mark.parametrize("heads", [(2, 2), (40, 1)], ids=str)
def test_heads_of_any_size_and_number(head_dim: int, heads: tuple[int, int]) -> None:
    """576 with all heads on one key is latent attention; 40 heads are more than a tile of 16 rows."""
    torch.manual_seed(0)
    sizes = spec(*heads)
    sizes.head_dim = head_dim  # type: ignore[misc]
    cache = KVCache(sizes, 9, BLOCK_SIZE, dtype=torch.float32, device=CPU)
    cache.data.normal_()
    tables = torch.tensor([[3, 1, 7], [8, 2, 0]])
    batch = AttentionBatch([0, 5, 6], [20, 13], tables, torch.zeros(6, dtype=torch.int64))
    check(torch.randn(6, heads[0], head_dim), cache, batch, Scoring(head_dim**-0.5))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "scoring",
    [Scoring(0.3), Scoring(0.3, window=37), Scoring(0.3, alibi=Alibi(torch.arange(1, 7, device=DEVICE) / 8))],
    ids=str,
)
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(dtype: torch.dtype, scoring: Scoring) -> None:
    """The last query of a prompt by itself, as a decode step has it, in a chunk, and among others."""
    query, cache, batch = moved(*make_step([(12, 1), (150, 90), (88, 1)], (6, 2), dtype, 0))
    attention = CudaAttention(exact=True)
    together = attention(query, cache, 1, batch, scoring)
    for queries in (1, 7, 64):
        rows = slice(91 - queries, 91)
        alone = AttentionBatch([0, queries], [150], batch.block_tables[1:2], batch.slot_mapping[rows])
        found = attention(query[rows], cache, 1, alone, scoring)
        assert torch.equal(found, together[rows])


def test_what_is_masked_is_not_multiplied() -> None:
    """A block's last owner may have left NaN behind the end of a sequence."""
    query, cache, batch = moved(*make_step([(13, 2), (5, 5)], (4, 4), torch.float32, 0))
    for sequence, length in enumerate(batch.seq_lens):
        block = batch.block_tables[sequence, length // BLOCK_SIZE]
        cache.data[:, block, :, :, length % BLOCK_SIZE :] = float("nan")
    found = CudaAttention(exact=True)(query, cache, 1, batch, Scoring(HEAD_DIM**-0.5))
    assert found.isfinite().all()
