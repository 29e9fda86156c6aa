"""How torch's paged FlashAttention is called, against a definition of what its documentation promises.

The function itself runs on GPUs alone (`block_size` tries it there before it is used).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from salver.model.attention import AttentionBatch, Scoring
from salver.model.attention.cpu import GatheringAttention
from salver.model.attention.cuda import VARLEN_PAGE, CudaAttention
from salver.model.attention.reference import ReferenceAttention
from salver.model.cache import KVCache
from salver.model.spec import AlibiPositions, ModelSpec, NormSpec, RopePositions
from salver.model.transformer import Transformer
from salver.server.engine.device_startup import choose_block_size

CPU = torch.device("cpu")
SPEC = ModelSpec(
    "Test", vocab_size=10, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=8, max_position_embeddings=512, norm=NormSpec("rms", 1e-6),
    positions=RopePositions(10000.0), activation="silu", gated=True, qkv_bias=False,
    attention_out_bias=False, mlp_bias=False, tied_head=True,
)  # fmt: skip


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int | None,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as its documentation says it, of pages of 256 tokens."""
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert key.shape[1] % 256 == 0 and key.stride(-1) == 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    left, right = window_size
    assert right == 0
    out = torch.empty_like(query)
    for i, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[i : i + 2].tolist()
        assert end - begin <= max_q and length <= max_k
        keys, values = (
            t[block_table[i]].flatten(0, 1)[:length].repeat_interleave(2, 1) for t in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], keys) * scale
        behind = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)
        hidden = behind < 0 if left < 0 else (behind < 0) | (behind > left)
        out[begin:end] = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values
        )
    return out


def step() -> tuple[Tensor, KVCache, AttentionBatch]:
    torch.manual_seed(0)
    cache = KVCache(SPEC, 5, VARLEN_PAGE, dtype=torch.float32, device=CPU)
    cache.data.normal_()
    tables = torch.tensor([[3, 1], [2, 0], [4, 0]])
    batch = AttentionBatch([0, 20, 30, 31], [300, 10, 77], tables, torch.zeros(33, dtype=torch.int64))
    return torch.randn(33, 4, 8), cache, batch


@pytest.mark.parametrize("window", [None, 1, 60])
@pytest.mark.parametrize("exact", [True, False])
def test_the_call_means_what_the_reference_computes(window: int | None, exact: bool) -> None:
    query, cache, batch = step()
    attention = CudaAttention(exact=exact)
    splits: list[int | None] = []

    def called(*args: Any, **options: Any) -> Tensor:
        splits.append(options["num_splits"])
        return documented(*args, **options)

    attention.varlen = called
    scoring = Scoring(0.3, window)
    found = attention(query, cache, 0, batch, scoring)
    torch.testing.assert_close(found, ReferenceAttention()(query, cache, 0, batch, scoring))
    assert splits == [1 if exact else None]


@pytest.mark.parametrize("broken", [None, "raises", "wrong"])
def test_large_pages_only_where_the_kernel_is_right(
    monkeypatch: pytest.MonkeyPatch, broken: str | None
) -> None:
    def tried(*args: Any, **options: Any) -> Tensor:
        if broken == "raises":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        found = documented(*wide, **options)
        return found * 1.1 if broken == "wrong" else found

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", tried)
    attention = CudaAttention(exact=True)
    assert attention.block_size(SPEC, torch.bfloat16, CPU) == (16 if broken else VARLEN_PAGE)
    assert (attention.varlen is None) == bool(broken)


def test_small_pages_for_what_the_kernel_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    attention = CudaAttention(exact=True)
    for spec in (
        replace(SPEC, score_cap=30.0),
        replace(SPEC, sinks=True),
        replace(SPEC, positions=AlibiPositions((0.5,) * 4)),
        replace(SPEC, head_dim=12),
        replace(SPEC, head_dim=512),
    ):
        assert attention.block_size(spec, torch.bfloat16, CPU) == 16
    assert attention.block_size(SPEC, torch.float32, CPU) == 16


def test_attention_in_plain_torch_where_our_kernel_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.")

    for kernel, expected in ((ReferenceAttention(), CudaAttention), (failing, GatheringAttention)):
        monkeypatch.setattr(CudaAttention, "_paged", staticmethod(kernel))
        model = Transformer(replace(SPEC, sinks=True), CudaAttention(exact=True))
        assert choose_block_size(model) == 16
        assert isinstance(model.attention, expected)
    assert "Failed to find C compiler" in capsys.readouterr().err
