"""One stack for every spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, AttentionBatch
from .cache import KVCache
from .layers import ACTIVATIONS, Linear, Norm, Rotation, Weights, rope_frequencies
from .spec import LearnedPositions, ModelSpec, RopePositions


class Decoder(Protocol):
    """What computes steps: `Transformer`, which documents these, or `kernels.program.NativeTransformer`."""

    spec: ModelSpec

    @property
    def device(self) -> torch.device: ...

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def num_parameters(self) -> int: ...


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.index = index
        self.num_heads = spec.num_heads
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.scale = spec.attention_scale
        self.gated = spec.gated
        self.activation = ACTIVATIONS[spec.activation]
        self.attention_norm = Norm(spec.norm, hidden)
        self.qkv = Linear(sum(spec.qkv_sizes), hidden, bias=spec.qkv_bias)
        self.attention_out = Linear(hidden, spec.qkv_sizes[0], bias=spec.attention_out_bias)
        self.mlp_norm = Norm(spec.norm, hidden)
        self.up = Linear(2 * inner if spec.gated else inner, hidden, bias=spec.mlp_bias)  # gate, up
        self.down = Linear(hidden, inner, bias=spec.mlp_bias)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cache: KVCache,
        attention: Attention,
        batch: AttentionBatch,
    ) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        heads = self.qkv(self.attention_norm(x)).view(x.shape[0], -1, self.head_dim)
        query_key = heads[:, : self.num_heads + self.num_kv_heads]
        if rotation is not None:
            query_key = rotation(query_key)
        query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=1)
        cache.write(self.index, key, heads[:, self.num_heads + self.num_kv_heads :], batch)
        x = x + self.attention_out(attention(query, cache, self.index, batch, self.scale))
        inner = self.up(self.mlp_norm(x))
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(up)
        else:
            inner = self.activation(inner)
        out: Tensor = x + self.down(inner)
        return out


class Transformer(nn.Module):
    """A decoder built from its spec. Parameters are uninitialized until `loader.load_model` fills them."""

    rope: Tensor | None

    def __init__(self, spec: ModelSpec, attention: Attention) -> None:
        super().__init__()
        self.spec = spec
        self.attention = attention
        self.embed = Weights(spec.vocab_size, spec.hidden_size)
        learned = isinstance(spec.positions, LearnedPositions)
        self.positions = Weights(spec.max_position_embeddings, spec.hidden_size) if learned else None
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.final_norm = Norm(spec.norm, spec.hidden_size)
        self.head = None if spec.tied_head else Linear(spec.vocab_size, spec.hidden_size)
        self.rope = None

    def place(self, device: torch.device) -> None:
        """Computes what is derived from the spec, on the device. The loader calls it."""
        if isinstance(self.spec.positions, RopePositions):
            self.rope = rope_frequencies(self.spec.positions, self.spec.head_dim).to(device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden_size] after the last norm, of token ids and positions int64 [N].

        Stores the keys and values of the rows, then attends through the cache. `on_layer` is
        called after each layer.
        """
        cache.begin_step(attention)
        x = F.embedding(token_ids, self.embed.weight)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions.weight)
        rotation = None if self.rope is None else Rotation(self.rope, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, cache, self.attention, attention)
            if on_layer is not None:
                on_layer()
        hidden: Tensor = self.final_norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, vocab_size] of hidden [R, hidden_size]."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight).float()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
