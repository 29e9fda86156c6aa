"""A decoder as a program of the native kernel."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter_base import AdapterBase
from ..adapter_reader import Adapter
from ..attention import AttentionBatch, Scoring
from ..cache import KVCache
from ..layers import Weights
from ..spec import LearnedPositions, ModelSpec, RopePositions
from ..transformer import Layer, OnAttention, Transformer
from .adapters import NativeAdapters, Place
from .build import KernelUnavailable, pairs_are_fast
from .compiled import ATTENDED, FINAL, HEADS, INNER, NORMED, PROGRESS_ROWS, RESIDUAL, Compiled
from .library import (
    ACTIVATIONS,
    BLOCK_SIZE,
    INT4_BLOCK,
    LANES,
    MAX_HEAD_DIM,
    MAX_WIDTH,
    CCache,
    CStep,
    Epilogue,
    Kind,
    Library,
    Precision,
    Progress,
)

HEAD_ROWS = 64  # rows of logits at a time


class NativeTransformer(Compiled):
    """A `Transformer` whose steps the kernel computes; takes over its weights.

    Calls are those of `Transformer`. Hidden states are float32. A row has the same bits whatever
    stands beside it, in every precision.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        library: Library,
        *,
        precision: Precision,
        threads: int,
        pairs: bool | None = None,
    ) -> None:
        """`pairs`: bf16 is multiplied with bf16, else with float32; None: as is faster on this processor.

        Raises KernelUnavailable for a model that the kernel does not know, before it takes anything.
        """
        spec = model.spec
        check(model, cache, precision)
        self._base = None if model.checkpoint is None else AdapterBase.of(model)
        self._places: dict[str, Place] = {}  # operations that adapters may change
        self._adapters = NativeAdapters((), {}, 0, library, precision, threads)
        super().__init__(library, precision, threads, pairs_are_fast() if pairs is None else pairs)
        self.spec: ModelSpec = spec
        self._parameters = model.num_parameters()
        self._rope = model.rope
        self._cache = cache
        self._buffers = self._make_buffers(
            spec.hidden_size, sum(spec.qkv_sizes), spec.qkv_sizes[0], spec.intermediate_size
        )
        self._compile(model)
        data = cache.data
        self._program.cache_precision = (
            Precision.FLOAT32 if data.dtype == torch.float32 else Precision.BFLOAT16
        )
        self._program.cache = CCache(
            keys_and_values=data.data_ptr(), blocks=cache.num_blocks, heads=spec.num_heads,
            kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, scale=spec.attention_scale,
        )  # fmt: skip
        self._reserve(HEAD_ROWS)

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return self._parameters

    # ---- the program ----

    def _compile(self, model: Transformer) -> None:
        tied = model.head is None
        self._head = self._weight(model.embed if model.head is None else model.head, self.precision.head)
        self._classifier = None
        if model.classifier is not None:
            self._classifier = self._weight(model.classifier, self.precision.head)
        embed = self._head if tied else self._table(model.embed)
        positions = -1 if model.positions is None else self._table(model.positions)
        place = self._place("embed", "embedding")
        self._add(Kind.EMBED, RESIDUAL, RESIDUAL, weight=embed, extra=positions, adapted=place)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            self._layer(layer)
        self._norm(model.final_norm, RESIDUAL, FINAL, self._place("final_norm", "norm"))

    def _layer(self, layer: Layer) -> None:
        number, name = layer.index, f"layers.{layer.index}"
        place = self._place(f"{name}.attention_norm", "norm")
        self._norm(layer.attention_norm, RESIDUAL, NORMED, place)
        self._multiply(f"{name}.qkv", layer.qkv, NORMED, HEADS)
        self._add(Kind.ROTATE_AND_STORE, HEADS, HEADS, layer=number)
        self._add(Kind.ATTEND, HEADS, self._first(ATTENDED), layer=number)
        self._narrow(ATTENDED)
        self._multiply(f"{name}.attention_out", layer.attention_out, ATTENDED, RESIDUAL, Epilogue.ADD)
        self._norm(layer.mlp_norm, RESIDUAL, NORMED, self._place(f"{name}.mlp_norm", "norm"))
        activation = ACTIVATIONS[self.spec.activation]
        epilogue = Epilogue.GATED if layer.gated else Epilogue.ACTIVATE
        out = self._first(INNER)
        self._multiply(f"{name}.up", layer.up, NORMED, out, epilogue, activation)
        self._narrow(INNER)
        self._multiply(f"{name}.down", layer.down, INNER, RESIDUAL, Epilogue.ADD)
        self._add(Kind.PROGRESS, RESIDUAL, RESIDUAL)

    def _multiply(
        self,
        name: str,
        module: Weights,
        in_: int,
        out: int,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
    ) -> None:
        """A product that adapters may change."""
        gated = epilogue is Epilogue.GATED
        place = self._place(name, "linear", module.weight.shape[0], gated)
        self._add(Kind.SHRINK, in_, in_, adapted=place)
        weight = self._weight(module, gated=gated)
        self._add(
            Kind.MULTIPLY, in_, out, weight=weight, epilogue=epilogue, activation=activation, adapted=place
        )

    def _place(self, name: str, kind: str, rows: int = 0, gated: bool = False) -> int:
        self._places[name] = Place(len(self._places), kind, rows, gated)
        return self._places[name].number

    # ---- steps ----

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: AttentionBatch,
        on_layer: Callable[[], None] | None = None,
        on_attention: OnAttention | None = None,
    ) -> Tensor:
        """As `Transformer.forward`; hidden states float32 [N, hidden_size], valid until the next step."""
        assert cache is self._cache
        rows = token_ids.numel()
        self._reserve(rows)
        cache.begin_step(attention)
        step, kept = _c_step(rows, attention)
        step.token_ids, step.positions = token_ids.data_ptr(), positions.data_ptr()
        if self.spec.encoder is not None:
            assert attention.source is not None, "the step says nothing of its sources"
            over, also_kept = _c_step(rows, attention.source)
            step.source = ctypes.addressof(over)
            kept += also_kept
        if self._rope is not None:
            angles = positions.to(torch.float32)[:, None] * self._rope
            cos, sin = angles.cos(), angles.sin()
            step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        self._tell_adapters(step, rows)
        told = Progress(on_layer) if on_layer is not None and rows >= PROGRESS_ROWS else Progress()
        if on_attention is None:
            self._library.run(self._program, step, self._threads, told)
        else:
            self._run_observed(step, Progress(self._attention_told(rows, on_attention, on_layer)))
        if on_layer is not None:
            on_layer()
        return self._tensors[FINAL][:rows]

    def _run_observed(self, step: CStep, told: Any) -> None:
        """Runs the program, stopping where `_attention_told` looks at the buffers."""
        self._library.run(self._program, step, self._threads, told)

    def _attention_told(
        self, rows: int, on_attention: OnAttention, on_layer: Callable[[], None] | None
    ) -> Callable[[], None]:
        """What the kernel calls after each layer, when its rotated heads are in their buffer still."""
        spec, layers = self.spec, itertools.count()
        scoring = Scoring(spec.attention_scale)

        def tell() -> None:
            heads = self._tensors[HEADS][:rows].view(rows, -1, spec.head_dim)
            query, key, _ = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
            on_attention(next(layers), query, key, scoring)
            if on_layer is not None:
                on_layer()

        return tell

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, vocab_size] of hidden float32 [R, hidden_size]."""
        return self._product(hidden, self._head)

    def classify(self, hidden: Tensor) -> Tensor:
        """float32 [R, labels] of hidden float32 [R, hidden_size]."""
        if self._classifier is None:
            raise ValueError(f"{self.spec.architecture} has no classifier")
        return self._product(hidden, self._classifier)

    def _product(self, hidden: Tensor, number: int) -> Tensor:
        hidden = hidden.contiguous()
        weight, adapters = self._weights[number], self._adapters
        adapted = number == self._head and adapters.head_numbers.numel() > 0
        out = torch.empty((hidden.shape[0], weight.rows))
        for begin in range(0, hidden.shape[0], HEAD_ROWS):
            rows = torch.arange(begin, min(begin + HEAD_ROWS, hidden.shape[0]))
            # Between steps the buffer of the normed rows is free.
            self._library.put_rows(self._c_buffers[NORMED], hidden, rows)
            part = out[begin : begin + rows.numel()]
            if not adapted:
                self._library.multiply(self._c_buffers[NORMED], weight, part, self._threads)
                continue
            numbers, room = adapters.head_numbers[begin : begin + rows.numel()], adapters.rows(rows.numel())
            self._library.multiply(
                self._c_buffers[NORMED], weight, part, self._threads, adapters.head_table, numbers, room
            )
        if adapted:
            adapters.multiply_own_heads(self._c_buffers[NORMED], hidden, out)
        return out

    # ---- adapters ----

    @property
    def adapter_base(self) -> AdapterBase:
        if self._base is None:
            raise ValueError("the model was not loaded from a checkpoint")
        return self._base

    def prepare_adapters(self, adapters: Sequence[Adapter]) -> PreparedAdapters:
        """See `adapters.AdapterSet`. Raises CheckpointError for what the kernel does not do."""
        rows = self._weights[self._head].rows
        made = NativeAdapters(adapters, self._places, rows, self._library, self.precision.head, self._threads)
        return PreparedAdapters(self, made)

    def install_adapters(self, adapters: NativeAdapters) -> None:
        self._adapters = adapters

    def _tell_adapters(self, step: CStep, rows: int) -> None:
        """Of a step of so many rows, its rows' adapters."""
        adapters, program = self._adapters, self._program
        if adapters.numbers.numel() != rows:
            assert not adapters.numbers.numel(), "a step of other rows than were selected"
            return
        program.adapted = adapters.table
        program.num_adapters = adapters.count
        program.shrunk, program.shrunk_stride = adapters.rows(rows).data_ptr(), adapters.width
        step.adapters = adapters.numbers.data_ptr()


class PreparedAdapters:
    """As `adapters.Installed`: `NativeAdapters` of a model that may have others still."""

    def __init__(self, model: NativeTransformer, adapters: NativeAdapters) -> None:
        self._model = model
        self._adapters = adapters
        self.begin, self.begin_head = adapters.begin, adapters.begin_head
        self.begin_sources = adapters.begin_sources

    def install(self) -> None:
        self._model.install_adapters(self._adapters)


# Of what a spec may say beside a Llama or GPT-2 block, what the kernel does.
KNOWN_DIFFERENCES = frozenset({"attention_multiplier", "body", "classifier"})


def _c_step(rows: int, batch: AttentionBatch) -> tuple[CStep, list[Tensor]]:
    """Who attends to what; and the tensors that must live as long."""
    starts = torch.tensor(batch.cu_seqlens_q, dtype=torch.int32)
    lengths = torch.tensor(batch.seq_lens, dtype=torch.int32)
    step = CStep(
        num_rows=rows,
        num_sequences=lengths.numel(),
        slots=batch.slot_mapping.data_ptr(),
        query_starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
        table_stride=batch.block_tables.stride(0),
    )
    return step, [starts, lengths]


def unsupported(spec: ModelSpec) -> str | None:
    """What of the architecture the kernel does not do; None: it does all of it."""
    known = KNOWN_DIFFERENCES
    if spec.encoder is not None:
        from . import seq2seq  # it needs this module

        known = seq2seq.KNOWN_DIFFERENCES
    for name in spec.differences():
        if name not in known:
            value = getattr(spec, name)
            shown = f" = {value!r}" if isinstance(value, str | int | float) else ""
            return f"it does not do {name}{shown}"
    norm, positions = spec.norm, spec.positions
    if not norm.weight or norm.offset or norm.has_bias != (norm.kind == "layer"):
        return f"it does not do {norm}"
    if spec.encoder is not None:
        return seq2seq.unsupported_positions(spec)
    if positions == LearnedPositions():
        return None
    if not isinstance(positions, RopePositions):
        return f"it does not do {positions!r:.80}"
    if positions.grows or positions.attention_factor != 1 or positions.rotary_dim not in (0, spec.head_dim):
        return f"it does not do {positions!r:.80}"
    return None


def check(model: Transformer, cache: KVCache, precision: Precision) -> None:
    """Raises KernelUnavailable, saying what of the model the kernel does not do."""
    spec = model.spec
    if (reason := unsupported(spec)) is not None:
        raise KernelUnavailable(reason)
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        raise KernelUnavailable(f"it computes float32 and bfloat16 on the CPU, not {model.dtype}")
    if cache.block_size != BLOCK_SIZE:
        raise KernelUnavailable(f"its blocks have {BLOCK_SIZE} tokens, not {cache.block_size}")
    if spec.head_dim % LANES or spec.head_dim > MAX_HEAD_DIM:
        raise KernelUnavailable(
            f"heads of {spec.head_dim} are not a multiple of {LANES} up to {MAX_HEAD_DIM}"
        )
    if spec.activation not in ACTIVATIONS:
        raise KernelUnavailable(f"it does not know the activation {spec.activation}")
    step = INT4_BLOCK if precision is Precision.INT4 else 4
    depths = (spec.hidden_size, spec.intermediate_size, spec.qkv_sizes[0])
    for size, multiple in (*((depth, step) for depth in depths), (sum(spec.qkv_sizes), 4)):
        if size % multiple or size > MAX_WIDTH:
            raise KernelUnavailable(f"a width of {size} is not a multiple of {multiple} up to {MAX_WIDTH}")
