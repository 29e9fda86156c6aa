"""The one stack: builds and runs whatever a `ModelSpec` says. No family is named here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salver.model.attention import Attention, AttentionBatch
from salver.model.cache import KVCache
from salver.model.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    Norm,
    rope_frequencies,
    rope_tables,
    rotate,
)
from salver.model.spec import ModelSpec


class Layer(nn.Module):
    """Attention, then MLP, each normalized before and added to what came in.

    x ─┬─ norm ─ qkv ─ rope ─ attention ─ out ─ + ─┬─ norm ─ up ─ act ─ down ─ + ─
       └───────────────────────────────────────┘   └──────────────────────────┘
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = Norm(spec)
        self.qkv = Linear(spec.hidden_size, spec.qkv_size, spec.qkv_bias)
        self.out = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, spec.attention_out_bias)
        self.mlp_norm = Norm(spec)
        width = 2 * spec.intermediate_size if spec.gated else spec.intermediate_size
        self.up = Linear(spec.hidden_size, width, spec.mlp_bias)
        self.down = Linear(spec.intermediate_size, spec.hidden_size, spec.mlp_bias)
        self.activation = ACTIVATIONS[spec.activation]

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, hidden] -> queries [N, heads, d], keys and values [N, kv_heads, d], rotated."""
        spec = self.spec
        qkv = self.qkv(self.attention_norm(x)).view(x.shape[0], -1, spec.head_dim)
        rotated, values = qkv.split([spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if rope is not None:
            rotated = rotate(rotated, *rope)
        queries, keys = rotated.split([spec.num_heads, spec.num_kv_heads], dim=1)
        return queries, keys, values

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.up(self.mlp_norm(x))
        if self.spec.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down(self.activation(gate) * hidden)  # type: ignore[no-any-return]
        return self.down(self.activation(hidden))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A decoder over a paged cache; a batch is flat rows of whatever sequences."""

    def __init__(self, spec: ModelSpec, attention: Attention) -> None:
        super().__init__()
        self.spec = spec
        self.attention = attention
        self.embed = Embedding(spec.vocab_size, spec.hidden_size)
        self.positions = (
            Embedding(spec.max_position_embeddings, spec.hidden_size) if spec.rope is None else None
        )
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.final_norm = Norm(spec)
        self.head = None if spec.tied_head else Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self._frequencies: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """token_ids, positions int64 [N] -> hidden [N, hidden_size], the final norm applied.

        Writes the keys and values of all rows to the cache, then attends through it.
        `on_layer` is called after every layer (a sign of life).
        """
        x = self.embed(token_ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        rope = self._rope(positions)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            queries, keys, values = layer.project(x, rope)
            cache.write(index, attention.slot_mapping, keys, values)
            mixed = self.attention(index, queries, cache, attention)
            x = x + layer.out(mixed.flatten(1))
            x = x + layer.mlp(x)
            if on_layer is not None:
                on_layer()
        return self.final_norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size]."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight).float()

    def num_parameters(self) -> int:
        """A tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.spec.rope is None:
            return None
        if self._frequencies is None:
            self._frequencies = rope_frequencies(self.spec.rope, self.spec.head_dim).to(self.device)
        return rope_tables(self._frequencies, positions, self.dtype)
