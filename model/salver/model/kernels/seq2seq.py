"""An encoder-decoder as programs of the native kernel: the decoder's steps, and what it keeps of sources.

The encoder stays torch's stack with its products in the kernel, in float32 whatever the decoder's precision
is: a source is read once.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Scoring, SourceBatch
from ..cache import KVCache
from ..encoder import EncoderBatch, OnHeads
from ..layers import Norm, Weights
from ..spec import BucketPositions, LearnedPositions, ModelSpec, SinusoidalPositions
from ..transformer import Layer, OnAttention, Transformer
from .compiled import ATTENDED, FINAL, HEADS, INNER, NORMED, RESIDUAL
from .library import (
    ACTIVATIONS,
    TILE,
    CBuffer,
    COperation,
    CProgram,
    CStep,
    Epilogue,
    Kind,
    Precision,
    Progress,
)
from .linear import replace_products
from .program import NativeTransformer

KEYS = 8  # the keys and values among the heads, as a buffer of its own
KNOWN_DIFFERENCES = frozenset(
    """
    norm_place embedding_norm final_norm attention_multiplier embedding_multiplier logit_multiplier
    logit_bias encoder own_embedding cross_bias
    """.split()
)


class NativeSeq2Seq(NativeTransformer):
    """A `Transformer` with an encoder; calls are those of `Transformer`."""

    def _compile(self, model: Transformer) -> None:
        assert model.encoder is not None
        spec = self.spec
        self._encoder = model.encoder
        if model.logit_bias is not None:
            bias = model.logit_bias.weight.detach().flatten()
            (model.embed if model.head is None else model.head).bias = nn.Parameter(bias, requires_grad=False)
        tied = model.head is None
        self._head = self._weight(model.embed if model.head is None else model.head, self.precision.head)
        embed = self._head if tied else self._table(model.embed)
        self._embedding = COperation(kind=Kind.EMBED, in_=RESIDUAL, out=RESIDUAL, weight=embed, extra=-1)
        if not spec.own_embedding:
            self._encoder.look_up = self._look_up
            if not tied:  # the table is held here
                model.embed.weight = nn.Parameter(model.embed.weight.new_empty(0), requires_grad=False)
        for name, module in self._encoder.named_children():
            if spec.own_embedding or name != "embed":
                module.float()
        replace_products(self._encoder, self._library, self._threads)
        self._add(Kind.EMBED, RESIDUAL, RESIDUAL, weight=embed, extra=self._positions(model))
        if spec.embedding_multiplier != 1:
            self._operations[-1].epsilon = spec.embedding_multiplier
        if model.embedding_norm is not None:
            self._norm(model.embedding_norm, RESIDUAL, RESIDUAL)
        self._stores: list[COperation] = []
        self._observed: list[COperation] = []
        self._scoring: list[Scoring] = []  # of each layer's own attention
        shared = self._biases(model, model.buckets)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            own = self._biases(model, layer.buckets)
            buckets = model.buckets if layer.buckets is None else layer.buckets
            self._scoring.append(Scoring(spec.attention_scale, distances=model.distances(buckets)))
            self._layer(layer, shared if own is None else own)
        if model.final_norm is not None:
            self._norm(model.final_norm, RESIDUAL, FINAL)
        else:
            self._add(Kind.QUANTIZE, RESIDUAL, FINAL)
        # The queries to the source take the place of a layer's own ones: whoever looks is called in between.
        for operation in self._operations:
            self._observed.append(operation)
            if operation.kind == Kind.ATTEND:
                self._observed.append(COperation(kind=Kind.PROGRESS, in_=RESIDUAL, out=RESIDUAL))

    def _positions(self, model: Transformer) -> int:
        """The table whose row p is position p's; -1: there is none."""
        positions = self.spec.positions
        if isinstance(positions, LearnedPositions):
            assert model.positions is not None
            rows = model.positions.weight.detach()[positions.offset :]
        elif model.waves is not None:
            rows = model.waves
        else:
            return -1
        table = Weights(0)
        table.weight = nn.Parameter(rows.contiguous(), requires_grad=False)
        return self._table(table)

    def _biases(self, model: Transformer, buckets: Weights | None) -> Tensor | None:
        """float32 [heads, context + a tile], for scores in powers of two: distances from far to near."""
        found = model.distances(buckets)
        if found is None:
            return None
        reach = self.spec.max_position_embeddings
        distances = torch.arange(reach - 1, -1 - TILE, -1).clamp(0, found.shape[1] - 1)
        return (found * math.log2(math.e))[:, distances].contiguous()

    def _layer(self, layer: Layer, biases: Tensor | None = None) -> None:
        number, cross = layer.index, layer.cross
        assert cross is not None and layer.cross_norm is not None
        self._enter(layer.attention_norm)
        self._add(Kind.MULTIPLY, NORMED, HEADS, weight=self._weight(layer.qkv))
        self._add(Kind.ROTATE_AND_STORE, HEADS, HEADS, layer=number)
        self._attend(Kind.ATTEND, number, biases)
        self._leave(layer.attention_norm, ATTENDED, layer.attention_out)
        self._enter(layer.cross_norm)
        self._add(Kind.MULTIPLY, NORMED, HEADS, weight=self._weight(cross.query))
        self._attend(Kind.ATTEND_SOURCE, number, None)
        self._leave(layer.cross_norm, ATTENDED, cross.out)
        self._enter(layer.mlp_norm)
        up = self._weight(layer.up, gated=layer.gated)
        epilogue = Epilogue.GATED if layer.gated else Epilogue.ACTIVATE
        activation = ACTIVATIONS[self.spec.activation]
        out = self._first(INNER)
        self._add(Kind.MULTIPLY, NORMED, out, weight=up, epilogue=epilogue, activation=activation)
        self._narrow(INNER)
        self._leave(layer.mlp_norm, INNER, layer.down)
        self._add(Kind.PROGRESS, RESIDUAL, RESIDUAL)
        # Of sources, apart from the steps.
        kept = COperation(kind=Kind.MULTIPLY, in_=NORMED, out=KEYS, weight=self._weight(cross.key_value))
        store = COperation(kind=Kind.ROTATE_AND_STORE, in_=HEADS, out=HEADS, layer=number, weight=-1)
        self._stores += [kept, store]

    def _enter(self, norm: Norm | None) -> None:
        """What a block's first product reads: the residual, normed if that comes before."""
        if self.spec.norm_place == "pre":
            self._norm(norm, RESIDUAL, NORMED)
        else:
            self._add(Kind.QUANTIZE, RESIDUAL, NORMED)

    def _attend(self, kind: Kind, layer: int, biases: Tensor | None) -> None:
        self._add(kind, HEADS, self._first(ATTENDED), layer=layer)
        if biases is not None:
            self._operations[-1].scale = self._keep(biases)
            self._operations[-1].extra = self.spec.max_position_embeddings
        self._narrow(ATTENDED)

    def _leave(self, norm: Norm | None, in_: int, out: Weights) -> None:
        """A block's last product, added to the residual, which is normed if that comes after."""
        self._add(Kind.MULTIPLY, in_, RESIDUAL, weight=self._weight(out), epilogue=Epilogue.ADD)
        if self.spec.norm_place == "post":
            self._norm(norm, RESIDUAL, RESIDUAL)

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights."""
        encoder = [*self._encoder.parameters(), *self._encoder.buffers()]
        return [*super().stored(), *(tensor for tensor in encoder if tensor.numel())]

    # ---- whoever looks at attention ----

    def _run_observed(self, step: CStep, told: Any) -> None:
        self._run_apart(self._observed, step, told)

    def _attention_told(
        self, rows: int, on_attention: OnAttention, on_layer: Callable[[], None] | None
    ) -> Callable[[], None]:
        """What the kernel calls after each attention of a layer to its own tokens, and at its end."""
        spec, calls = self.spec, itertools.count()
        to_source = Scoring(spec.attention_scale)

        def tell() -> None:
            layer, ends = divmod(next(calls), 2)
            heads = self._tensors[HEADS][:rows].view(rows, -1, spec.head_dim)
            query, key, _ = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
            if not ends:
                on_attention(layer, query, key, self._scoring[layer])
                return
            on_attention(layer, query, None, to_source)
            if on_layer is not None:
                on_layer()

        return tell

    # ---- sources ----

    def _aliases(self) -> list[CBuffer]:
        heads, first = self._tensors[HEADS], self.spec.qkv_sizes[0]
        return [
            CBuffer(
                data=heads.data_ptr() + first * heads.element_size(), stride=heads.stride(0),
                precision=Precision.FLOAT32, width=heads.shape[1] - first,
            )
        ]  # fmt: skip

    def encode(
        self,
        sources: EncoderBatch,
        cache: KVCache,
        slots: SourceBatch,
        on_layer: Callable[[], None] | None = None,
        on_heads: OnHeads | None = None,
    ) -> None:
        """As `Transformer.encode`."""
        assert cache is self._cache
        hidden = self._encoder(sources, on_layer, on_heads).contiguous()
        rows = hidden.shape[0]
        self._reserve(rows)
        cache.begin_step(slots)
        self._library.put_rows(self._c_buffers[NORMED], hidden, torch.arange(rows))
        bounds = torch.tensor([0, slots.num_tokens], dtype=torch.int32)
        step = CStep(
            num_rows=rows,
            num_sequences=1,
            slots=slots.slot_mapping.data_ptr(),
            query_starts=bounds.data_ptr(),
        )
        self._run_apart(self._stores, step)

    def source_keys(self, cache: KVCache, layer: int, blocks: list[int]) -> Tensor:
        """As `Transformer.source_keys`. A block's keys lie as `source/attention.h` says."""
        spec, step = self.spec, 4 // cache.data.element_size()
        keys = cache.data[layer, blocks, 0].view(
            -1, spec.num_kv_heads, spec.head_dim // step, cache.block_size, step
        )
        return keys.permute(0, 3, 1, 2, 4).reshape(-1, spec.num_kv_heads, spec.head_dim).float()

    def _look_up(self, token_ids: Tensor) -> Tensor:
        """float32 [N, hidden_size]: embeddings, of the packed head where they are tied."""
        rows = token_ids.numel()
        self._reserve(rows)
        step = CStep(num_rows=rows, token_ids=token_ids.data_ptr())
        self._run_apart([self._embedding], step)
        return self._tensors[RESIDUAL][:rows].clone()

    def _run_apart(self, operations: list[COperation], step: CStep, told: Any = None) -> None:
        """Runs operations on the buffers of the steps, between two of them."""
        program = CProgram()
        ctypes.pointer(program)[0] = self._program
        array = (COperation * len(operations))(*operations)
        program.operations, program.num_operations = array, len(operations)
        self._library.run(program, step, self._threads, Progress() if told is None else told)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, vocab_size] of hidden float32 [R, hidden_size]."""
        found = super().logits(hidden)
        return found if self.spec.logit_multiplier == 1 else found.mul_(self.spec.logit_multiplier)


def unsupported_positions(spec: ModelSpec) -> str | None:
    """What of an encoder-decoder's positions the kernel does not do."""
    if isinstance(spec.positions, LearnedPositions | SinusoidalPositions | BucketPositions):
        return None
    return f"it does not do {spec.positions!r:.80}"
