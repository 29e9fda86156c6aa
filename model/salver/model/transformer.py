"""One stack for every spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .arithmetic import LoadedTensor
from .attention import Alibi, Attention, AttentionBatch, Scoring, SourceBatch
from .buckets import distance_buckets
from .cache import KVCache
from .cross import CrossAttention
from .encoder import Encoder, EncoderBatch, OnHeads
from .experts import ExpertProducts, Experts
from .latent import Latent
from .layers import ACTIVATIONS, Embedding, Linear, Norm, TiedHead, Weights, capped
from .parallel import Shards
from .rope import Rope, Rotation, sinusoids
from .spec import AlibiPositions, BucketPositions, LearnedPositions, ModelSpec, SinusoidalPositions

# Is told each layer's index, its queries [N, heads, head_dim] and keys [N, kv_heads, head_dim] as they are
# multiplied, and how they are scored. The tensors change afterwards. Of an attention to sources there are no
# keys: they stand in the cache.
OnAttention = Callable[[int, Tensor, Tensor | None, Scoring], None]


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
        on_attention: OnAttention | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def num_parameters(self) -> int: ...

    def stored(self) -> list[Tensor]: ...


class SourceDecoder(Decoder, Protocol):
    """One that reads sources too: a `Transformer` with an encoder, or `kernels.seq2seq.NativeSeq2Seq`."""

    def encode(
        self,
        sources: EncoderBatch,
        cache: KVCache,
        slots: SourceBatch,
        on_layer: Callable[[], None] | None = None,
        on_heads: OnHeads | None = None,
    ) -> None: ...

    def source_keys(self, cache: KVCache, layer: int, blocks: list[int]) -> Tensor: ...


@runtime_checkable
class Classifying(Protocol):
    """A `Decoder` of a spec with a classifier."""

    def classify(self, hidden: Tensor) -> Tensor: ...


class Layer(nn.Module):
    """Attention and MLP, each added to what it reads; see `ModelSpec` for where norms stand."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.index = index
        self.num_heads = spec.num_heads
        self.num_kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.scoring = Scoring(spec.attention_scale, spec.window(index), spec.score_cap)
        self.gated = spec.gated
        self.up_limit = spec.up_limit
        self.activation = ACTIVATIONS[spec.activation]
        self.qkv_clip = spec.qkv_clip
        self.norm_place = spec.norm_place
        self.parallel = spec.parallel
        self.residual_multiplier = spec.residual_multiplier
        one, two = spec.norm_place != "output", spec.norm_place in ("output", "sandwich")
        self.attention_norm = Norm(spec.norm, hidden) if one else None
        query, key, _ = spec.qkv_sizes
        self.latent: Latent | None = None
        if spec.latent is None:
            self.qkv = Linear(sum(spec.qkv_sizes), hidden, bias=spec.qkv_bias)
        else:
            self.latent = Latent(spec, spec.latent)
            query = spec.num_heads * spec.latent.value_dim
        self.query_norm = self._head_norm(spec, spec.num_heads, query)
        self.key_norm = self._head_norm(spec, spec.num_kv_heads, key)
        self.sinks = Weights(spec.num_heads) if spec.sinks else None
        self.attention_out = Linear(hidden, query, bias=spec.attention_out_bias)
        self.attention_out_norm = Norm(spec.norm, hidden) if two else None
        self.cross = CrossAttention(spec, index) if spec.encoder is not None else None
        self.cross_norm = Norm(spec.norm, hidden) if spec.encoder is not None else None
        self.buckets: Weights | None = None
        if isinstance(spec.positions, BucketPositions) and spec.positions.own:
            self.buckets = Weights(spec.positions.num_buckets, spec.num_heads)
        self.mlp_norm = Norm(spec.norm, hidden) if one and not spec.shared_norm else None
        self.experts: Experts | None = None
        if spec.experts is not None and index in spec.expert_layers:
            self.experts = Experts(spec, spec.experts, self._inner)
        else:
            self.up = Linear(2 * inner if spec.gated else inner, hidden, bias=spec.mlp_bias)  # gate, up
            self.down = Linear(hidden, inner, bias=spec.mlp_bias)
        self.mlp_out_norm = Norm(spec.norm, hidden) if two else None

    @staticmethod
    def _head_norm(spec: ModelSpec, heads: int, width: int) -> Norm | None:
        if spec.head_norm is None:
            return None
        norm, scope = spec.head_norm.norm, spec.head_norm.scope
        return Norm(norm, width if scope == "all" else spec.head_dim, heads if scope == "heads" else 0)

    def place(self, spec: ModelSpec, device: torch.device) -> None:
        """Computes what is derived from the spec, on the device."""
        if isinstance(spec.positions, AlibiPositions):
            slopes = torch.tensor(spec.positions.slopes, dtype=torch.float32, device=device)
            alibi = Alibi(slopes, spec.positions.multiplier, spec.positions.rounded)
            self.scoring = replace(self.scoring, alibi=alibi)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        distances: Tensor | None,
        cache: KVCache,
        attention: Attention,
        batch: AttentionBatch,
    ) -> Tensor:
        """[N, hidden] to [N, hidden]."""
        before = self.norm_place != "post"
        normed = self.attention_norm(x) if self.attention_norm is not None and before else x
        attended = self._attend(normed, rotation, distances, cache, attention, batch)
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm(attended)
        if self.residual_multiplier != 1:
            attended = attended * self.residual_multiplier
        if self.parallel:
            if self.mlp_norm is not None:
                normed = self.mlp_norm(x)
            return x + attended + self._mlp(normed)
        x = x + attended
        if self.attention_norm is not None and not before:
            x = self.attention_norm(x)
        if self.cross is not None and self.cross_norm is not None:
            assert batch.source is not None, "the step says nothing of its sources"
            read = self.cross(self.cross_norm(x) if before else x, cache, attention, batch.source)
            x = x + read if before else self.cross_norm(x + read)
        found = self._mlp(self.mlp_norm(x) if self.mlp_norm is not None and before else x)
        if self.mlp_out_norm is not None:
            found = self.mlp_out_norm(found)
        if self.residual_multiplier != 1:
            found = found * self.residual_multiplier
        x = x + found
        return self.mlp_norm(x) if self.mlp_norm is not None and not before else x

    def _attend(
        self,
        x: Tensor,
        rotation: Rotation | None,
        distances: Tensor | None,
        cache: KVCache,
        attention: Attention,
        batch: AttentionBatch,
    ) -> Tensor:
        """[N, hidden] of normed [N, hidden]."""
        if self.latent is not None:
            assert rotation is not None
            query, vectors = self.latent.query(x, rotation), self.latent.vectors(x, rotation)
            cache.write(self.index, vectors, vectors, batch)
            found = attention(query, cache, self.index, batch, self.scoring)
            return self.attention_out(self.latent.values(found))
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            heads = self._norm_heads(heads, self.query_norm, self.key_norm)
        if self.qkv_clip:
            heads = heads.clamp(-self.qkv_clip, self.qkv_clip)
        query_key = heads[:, : self.num_heads + self.num_kv_heads]
        if rotation is not None:
            query_key = rotation(query_key)
        query, key = torch.split(query_key, [self.num_heads, self.num_kv_heads], dim=1)
        cache.write(self.index, key, heads[:, self.num_heads + self.num_kv_heads :], batch)
        scoring = self.scoring if self.sinks is None else replace(self.scoring, sinks=self.sinks.weight)
        if distances is not None:
            scoring = replace(scoring, distances=distances)
        return self.attention_out(attention(query, cache, self.index, batch, scoring))

    def _norm_heads(self, heads: Tensor, query_norm: Norm, key_norm: Norm) -> Tensor:
        """Heads [N, q, k and v heads, head_dim], queries and keys normalized by head or all as one."""
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        whole = query_norm.shape[0] != self.head_dim
        query, key = (
            norm(part.flatten(1)).view(part.shape) if whole else norm(part)
            for norm, part in ((query_norm, query), (key_norm, key))
        )
        return torch.cat((query, key, value), dim=1)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.experts is not None:
            return self.experts(x)
        return self.down(self._inner(self.up(x)))

    def _inner(self, x: Tensor) -> Tensor:
        """Of up's product, what down multiplies."""
        if not self.gated:
            return self.activation(x)
        gate, up = x.chunk(2, dim=-1)
        if self.up_limit:
            gate, up = gate.clamp(max=self.up_limit), up.clamp(-self.up_limit, self.up_limit) + 1
        return self.activation(gate).mul_(up)


class Transformer(nn.Module):
    """A decoder built from its spec. Parameters are uninitialized until `loader.load_model` fills them."""

    loaded: tuple[LoadedTensor, ...] = ()  # what the parameters were made of
    checkpoint: Path | None = None  # and the directory that they came from
    adapter_hooks: tuple[RemovableHandle, ...] = ()
    rows = 0  # of every product, where a GPU shall give a row the same bits in any step; see `layers.product`
    shards: Shards | None = None  # of one that holds a part of each matrix

    def __init__(self, spec: ModelSpec, attention: Attention) -> None:
        super().__init__()
        self.spec = spec
        self.attention = attention
        width = spec.embedding_size or spec.hidden_size
        narrow = width != spec.hidden_size
        self.embed = Embedding(spec.vocab_size, width)
        self.embed_in = Linear(spec.hidden_size, width) if narrow else None
        self.embed_out = Linear(width, spec.hidden_size) if narrow else None
        self.embedding_norm = Norm(spec.embedding_norm, spec.hidden_size) if spec.embedding_norm else None
        self.positions: Embedding | None = None
        if isinstance(spec.positions, LearnedPositions):
            rows = spec.max_position_embeddings + spec.positions.offset
            self.positions = Embedding(rows, spec.hidden_size)
        self.buckets: Weights | None = None
        if isinstance(spec.positions, BucketPositions) and not spec.positions.own:
            self.buckets = Weights(spec.positions.num_buckets, spec.num_heads)
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.final_norm = Norm(spec.norm, spec.hidden_size) if spec.final_norm else None
        self.head = None if spec.tied_head else Linear(spec.vocab_size, width, bias=spec.head_bias)
        self.tied_head = TiedHead(self.embed) if spec.tied_head else None
        self.logit_bias = Weights(1, spec.vocab_size) if spec.logit_bias else None
        self.encoder = None if spec.encoder is None else Encoder(spec.encoder)
        if self.encoder is not None and not spec.own_embedding:
            self.encoder.embed = self.embed
        self._bucket_of: Tensor | None = None  # int64, of each distance
        self.classifier: Linear | None = None
        if spec.classifier is not None:
            num_labels = len(spec.classifier.labels)
            self.classifier = Linear(num_labels, spec.hidden_size, bias=spec.classifier.bias)
        self._ropes: list[Rope] = []
        self._rope_of: list[int | None] = []  # of each layer, which of them
        self.waves: Tensor | None = None

    def place(self, device: torch.device) -> None:
        """Computes what is derived from the spec, on the device. The loader calls it."""
        spec = self.spec
        by_layer = [spec.rope(layer) for layer in range(spec.num_layers)]
        kinds = list(dict.fromkeys(rope for rope in by_layer if rope is not None))
        head_dim = spec.head_dim if spec.latent is None else spec.latent.rotary_dim
        self._ropes = [Rope(rope, head_dim, device) for rope in kinds]
        self._rope_of = [None if rope is None else kinds.index(rope) for rope in by_layer]
        if isinstance(spec.positions, SinusoidalPositions):
            self.waves = sinusoids(spec.positions, spec.max_position_embeddings, spec.hidden_size).to(device)
        if isinstance(spec.positions, BucketPositions):
            distance = torch.arange(spec.positions.max_distance + 1, device=device)
            buckets, farthest = spec.positions.num_buckets, spec.positions.max_distance
            self._bucket_of = distance_buckets(distance, buckets, farthest)
        if self.encoder is not None:
            self.encoder.place(device)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.place(spec, device)

    @property
    def rope(self) -> Tensor | None:
        """float32 [rotary_dim / 2]: radians per position of the first rope, for specs with one or none."""
        return self._ropes[0].frequencies if self._ropes else None

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
        on_attention: OnAttention | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden_size] after the last norm, of token ids and positions int64 [N].

        Stores the keys and values of the rows, then attends through the cache. `on_layer` is
        called after each layer.
        """
        attend = self.attention if on_attention is None else _Observed(self.attention, on_attention)
        if self.attention.reads_stale:
            cache.begin_step(attention)
        x = self._embed(token_ids, positions)
        lengths = None
        if any(rope.spec.grows for rope in self._ropes):
            lengths = attention.derive(_prompt_lengths)
            lengths = positions + 1 if lengths is None else torch.maximum(lengths, positions + 1)
        rotations = [rope.rotation(positions, lengths, x.dtype) for rope in self._ropes]
        distances = self.distances(self.buckets)
        for layer, rope in zip(self.layers, self._rope_of, strict=True):
            rotation = None if rope is None else rotations[rope]
            own = self.distances(layer.buckets) if isinstance(layer.buckets, Weights) else distances
            x = layer(x, rotation, own, cache, attend, attention)
            if on_layer is not None:
                on_layer()
        return x if self.final_norm is None else self.final_norm(x)

    @property
    def cross_layers(self) -> list[CrossAttention]:
        """Of every layer, its attention to the source; none of a decoder alone."""
        return [layer.cross for layer in self.layers if isinstance(layer.cross, CrossAttention)]

    def encode(
        self,
        sources: EncoderBatch,
        cache: KVCache,
        slots: SourceBatch,
        on_layer: Callable[[], None] | None = None,
        on_heads: OnHeads | None = None,
    ) -> None:
        """Reads sources and stores, at `slots`, what every layer attends to of them.

        `on_heads` is as in `Encoder.forward`.
        """
        assert self.encoder is not None, f"{self.spec.architecture} has no encoder"
        hidden = self.encoder(sources, on_layer, on_heads)
        cache.begin_step(slots)
        for cross in self.cross_layers:
            cross.remember(hidden, cache, slots)

    def source_keys(self, cache: KVCache, layer: int, blocks: list[int]) -> Tensor:
        """float32 [len(blocks) * block_size, kv_heads, head_dim]: what `encode` stored there, in a layer."""
        return cache.keys(layer)[blocks].flatten(0, 1).float()

    def distances(self, buckets: Weights | None) -> Tensor | None:
        """float32 [num_heads, distance]: the bias of each distance."""
        if buckets is None or self._bucket_of is None:
            return None
        return F.embedding(self._bucket_of, buckets.weight).T.float().contiguous()

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[N, hidden_size]"""
        x = self.embed(token_ids) if self.shards is None else self.shards.embed(token_ids, self.embed.weight)
        if self.spec.embedding_multiplier != 1:
            # Rounded as x is, and a number of the host: a copy to the device cannot be captured.
            x = x * torch.tensor(self.spec.embedding_multiplier, dtype=x.dtype).item()
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.positions is not None and isinstance(self.spec.positions, LearnedPositions):
            x = x + self.positions(positions + self.spec.positions.offset)
        if self.waves is not None:
            x = x + F.embedding(positions, self.waves).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, vocab_size] of hidden [R, hidden_size]."""
        if self.embed_out is not None:
            hidden = self.embed_out(hidden)
        head = self.head if self.tied_head is None else self.tied_head
        assert head is not None
        logits = head(hidden)
        if self.shards is not None:
            logits = self.shards.whole_logits(logits)
        logits = logits.float()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias.weight.float()
        if self.spec.logit_multiplier != 1:
            logits = logits * self.spec.logit_multiplier
        return capped(logits, self.spec.logit_cap) if self.spec.logit_cap else logits

    def classify(self, hidden: Tensor) -> Tensor:
        """float32 [R, labels] of hidden [R, hidden_size]. Raises ValueError without a classifier."""
        if self.classifier is None:
            raise ValueError(f"{self.spec.architecture} has no classifier")
        return self.classifier(hidden).float()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def pad_experts(self, row_multiple: int) -> None:
        """An expert's rows are padded to a multiple of this, as those of the step are."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.row_multiple = row_multiple

    def fix_rows(self, rows: int) -> None:
        """From now on products are of so many rows each; see `layers.product`."""
        self.rows = rows
        for module in self.modules():
            if isinstance(module, Linear | ExpertProducts | TiedHead):
                module.rows = rows

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights."""
        return [*self.parameters(), *self.buffers()]


class _Observed:
    """An attention that tells what it multiplies."""

    def __init__(self, attention: Attention, on_attention: OnAttention) -> None:
        self.reads_stale = attention.reads_stale
        self._attention = attention
        self._on_attention = on_attention

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        if isinstance(batch, SourceBatch):
            self._on_attention(layer, query, None, scoring)
            return self._attention(query, cache, layer, batch, scoring)
        size, slots = cache.block_size, batch.slot_mapping
        self._on_attention(layer, query, cache.keys(layer)[slots // size, slots % size], scoring)
        return self._attention(query, cache, layer, batch, scoring)


def _prompt_lengths(batch: AttentionBatch) -> Tensor | None:
    """int64 [N]: of each row, its sequence's prompt; 0 for padding."""
    if not batch.prompt_lens:
        return None
    lengths = torch.zeros(batch.slot_mapping.numel(), dtype=torch.int64)
    for sequence, length in enumerate(batch.prompt_lens):
        lengths[batch.cu_seqlens_q[sequence] : batch.cu_seqlens_q[sequence + 1]] = length
    return lengths.to(batch.slot_mapping.device)
