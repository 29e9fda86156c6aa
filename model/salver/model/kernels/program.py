"""A model as a program of the native kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter_reader import Adapter, AdapterBase
from ..attention import AttentionBatch, Scoring
from ..cache import KVCache
from ..layers import Norm, Weights
from ..spec import LearnedPositions, ModelSpec, RopePositions
from ..transformer import Layer, OnAttention, Transformer
from .adapters import NativeAdapters, Place, in_panels
from .build import KernelUnavailable, pairs_are_fast
from .library import (
    ACTIVATIONS,
    BLOCK_SIZE,
    INT4_BLOCK,
    LANES,
    MAX_HEAD_DIM,
    MAX_WIDTH,
    CBuffer,
    CCache,
    COperation,
    CProgram,
    CStep,
    CWeight,
    Epilogue,
    Kind,
    Library,
    Precision,
    Progress,
    num_panels,
)

# Buffers of a step, one row for each of its rows.
RESIDUAL, NORMED, HEADS, ATTENDED, INNER, FINAL = range(6)
WIDE = {ATTENDED: 6, INNER: 7}  # of int8 buffers, the floats that they are rounded from
GROUP, INNER_GROUP = 64, 128  # values of an int8 row that share a scale; with int4 weights a block's
HEAD_ROWS = 64  # rows of logits at a time
PROGRESS_ROWS = 64  # a step of fewer rows is over before anybody asks how it goes


@dataclass
class _Buffer:
    width: int
    precision: Precision


class NativeTransformer:
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
        self.spec: ModelSpec = spec
        self.device = torch.device("cpu")
        self.precision = precision
        self._pairs = pairs_are_fast() if pairs is None else pairs
        self._parameters = model.num_parameters()
        self._rope = model.rope
        self._library = library
        self._threads = threads
        self._cache = cache
        self._kept: list[object] = []  # what C points to
        self._weights: list[CWeight] = []
        self._operations: list[COperation] = []
        query, inner = spec.qkv_sizes[0], spec.intermediate_size
        wide = int(precision.rounds_activations)
        inputs = precision  # what products read
        if precision is Precision.BFLOAT16 and not self._pairs:
            inputs = Precision.FLOAT32
        elif precision.rounds_activations:
            inputs = Precision.INT8
        self._buffers = [
            _Buffer(spec.hidden_size, Precision.FLOAT32),
            _Buffer(spec.hidden_size, inputs),
            _Buffer(sum(spec.qkv_sizes), Precision.FLOAT32),
            _Buffer(query, inputs),
            _Buffer(inner, inputs),
            _Buffer(spec.hidden_size, Precision.FLOAT32),
            _Buffer(wide * query, Precision.FLOAT32),
            _Buffer(wide * inner, Precision.FLOAT32),
        ]
        self._places: dict[str, Place] = {}  # operations that adapters may change
        self._adapters = NativeAdapters((), {}, 0, library, precision, threads)
        self._compile(model)
        self._rows = 0
        self._program = CProgram()
        self._reserve(HEAD_ROWS)

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return self._parameters

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights."""
        return [kept for kept in self._kept if isinstance(kept, Tensor)]

    # ---- the program ----

    def _compile(self, model: Transformer) -> None:
        tied = model.head is None
        self._head = self._weight(model.embed if model.head is None else model.head, self.precision.head)
        embed = self._head if tied else self._table(model.embed)
        positions = -1 if model.positions is None else self._table(model.positions)
        place = self._place("embed", "embedding")
        self._add(Kind.EMBED, RESIDUAL, RESIDUAL, weight=embed, extra=positions, adapted=place)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            self._layer(layer)
        self._norm("final_norm", model.final_norm, RESIDUAL, FINAL)

    def _layer(self, layer: Layer) -> None:
        number, name = layer.index, f"layers.{layer.index}"
        self._norm(f"{name}.attention_norm", layer.attention_norm, RESIDUAL, NORMED)
        self._multiply(f"{name}.qkv", layer.qkv, NORMED, HEADS)
        self._add(Kind.ROTATE_AND_STORE, HEADS, HEADS, layer=number)
        self._add(Kind.ATTEND, HEADS, self._first(ATTENDED), layer=number)
        self._narrow(ATTENDED)
        self._multiply(f"{name}.attention_out", layer.attention_out, ATTENDED, RESIDUAL, Epilogue.ADD)
        self._norm(f"{name}.mlp_norm", layer.mlp_norm, RESIDUAL, NORMED)
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

    def _first(self, buffer: int) -> int:
        """Where an operation writes what a product reads from `buffer`: int8 needs whole rows first."""
        return WIDE[buffer] if self.precision.rounds_activations else buffer

    def _narrow(self, buffer: int) -> None:
        if self.precision.rounds_activations:
            self._add(Kind.QUANTIZE, WIDE[buffer], buffer)

    def _add(
        self,
        kind: Kind,
        in_: int,
        out: int,
        *,
        layer: int = 0,
        weight: int = -1,
        extra: int = -1,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
        adapted: int = -1,
    ) -> None:
        operation = COperation(
            kind=kind, layer=layer, in_=in_, out=out, weight=weight, extra=extra,
            epilogue=epilogue, activation=activation, adapted=adapted,
        )  # fmt: skip
        self._operations.append(operation)

    def _norm(self, name: str, norm: Norm | None, in_: int, out: int) -> None:
        assert norm is not None and norm.weight is not None  # see `unsupported`
        kind = Kind.RMS_NORM if norm.rms else Kind.LAYER_NORM
        self._add(kind, in_, out, adapted=self._place(name, "norm"))
        operation = self._operations[-1]
        operation.scale = self._keep(norm.weight.detach().float())
        operation.shift = None if norm.bias is None else self._keep(norm.bias.detach().float())
        operation.epsilon = norm.eps

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as this."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _weight(self, module: Weights, precision: Precision | None = None, gated: bool = False) -> int:
        """Packs a matrix and empties its module."""
        precision = self.precision if precision is None else precision
        weight, bias = module.weight.detach(), module.bias
        module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        packed, scale = self._library.pack(weight, precision, gated, self._threads)
        rows, depth = weight.shape
        panels = num_panels(rows, gated)
        found = CWeight(data=self._keep(packed), precision=precision, rows=rows, depth=depth, panels=panels)
        if scale.numel():
            found.column_scale = self._keep(scale)
        if bias is not None:
            found.bias = self._keep(in_panels(bias.detach().float()[:, None], gated))
        self._weights.append(found)
        return len(self._weights) - 1

    def _table(self, module: Weights) -> int:
        """A matrix that is read by rows, as it is."""
        weight = module.weight.detach().contiguous()
        if self.precision is Precision.INT4:  # whose weights came in float32
            weight = weight.to(torch.bfloat16)
        precision = Precision.FLOAT32 if weight.dtype == torch.float32 else Precision.BFLOAT16
        rows, depth = weight.shape
        self._weights.append(
            CWeight(data=self._keep(weight), precision=precision, rows=rows, depth=depth, panels=0)
        )
        return len(self._weights) - 1

    # ---- steps ----

    def _reserve(self, rows: int) -> None:
        """Room for a step of so many rows."""
        if rows <= self._rows:
            return
        self._rows = max(rows, 2 * self._rows)
        self._tensors = [
            torch.zeros((self._rows, buffer.width), dtype=buffer.precision.activations)
            for buffer in self._buffers
        ]
        int4 = self.precision is Precision.INT4
        group, inner_group = (INT4_BLOCK, INT4_BLOCK) if int4 else (GROUP, INNER_GROUP)
        groups = max(-(-buffer.width // group) for buffer in self._buffers)
        # One product at a time reads int8 rows: their scales take turns in one place.
        self._group_scale = torch.zeros((groups, self._rows))
        self._group_sum = torch.zeros((groups, self._rows)) if int4 else None
        self._row_offset = torch.zeros(self._rows)
        buffers = [
            CBuffer(
                data=tensor.data_ptr(), stride=buffer.width, precision=buffer.precision, width=buffer.width,
                group_scale=self._group_scale.data_ptr(), row_offset=self._row_offset.data_ptr(),
                scale_stride=self._rows, group=inner_group if number == INNER else group,
                group_sum=None if self._group_sum is None else self._group_sum.data_ptr(),
            )
            for number, (tensor, buffer) in enumerate(zip(self._tensors, self._buffers, strict=True))
        ]  # fmt: skip
        spec, program = self.spec, self._program
        self._c_buffers = (CBuffer * len(buffers))(*buffers)
        self._c_weights = (CWeight * len(self._weights))(*self._weights)
        self._c_operations = (COperation * len(self._operations))(*self._operations)
        program.operations, program.num_operations = self._c_operations, len(self._operations)
        program.buffers, program.weights = self._c_buffers, self._c_weights
        data = self._cache.data
        program.pairs = self._pairs
        program.cache_precision = Precision.FLOAT32 if data.dtype == torch.float32 else Precision.BFLOAT16
        program.cache = CCache(
            keys_and_values=data.data_ptr(), blocks=self._cache.num_blocks, heads=spec.num_heads,
            kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, scale=spec.attention_scale,
        )  # fmt: skip

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
        starts = torch.tensor(attention.cu_seqlens_q, dtype=torch.int32)
        lengths = torch.tensor(attention.seq_lens, dtype=torch.int32)
        step = CStep(
            num_rows=rows,
            num_sequences=lengths.numel(),
            token_ids=token_ids.data_ptr(),
            positions=positions.data_ptr(),
            slots=attention.slot_mapping.data_ptr(),
            query_starts=starts.data_ptr(),
            lengths=lengths.data_ptr(),
            block_tables=attention.block_tables.data_ptr(),
            table_stride=attention.block_tables.stride(0),
        )
        if self._rope is not None:
            angles = positions.to(torch.float32)[:, None] * self._rope
            cos, sin = angles.cos(), angles.sin()
            step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        self._tell_adapters(step, rows)
        told = Progress(on_layer) if on_layer is not None and rows >= PROGRESS_ROWS else Progress()
        if on_attention is not None:
            told = Progress(self._attention_told(rows, on_attention, on_layer))
        self._library.run(self._program, step, self._threads, told)
        if on_layer is not None:
            on_layer()
        return self._tensors[FINAL][:rows]

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
        hidden = hidden.contiguous()
        weight, adapters = self._weights[self._head], self._adapters
        out = torch.empty((hidden.shape[0], weight.rows))
        for begin in range(0, hidden.shape[0], HEAD_ROWS):
            rows = torch.arange(begin, min(begin + HEAD_ROWS, hidden.shape[0]))
            # Between steps the buffer of the normed rows is free.
            self._library.put_rows(self._c_buffers[NORMED], hidden, rows)
            part = out[begin : begin + rows.numel()]
            if not adapters.head_numbers.numel():
                self._library.multiply(self._c_buffers[NORMED], weight, part, self._threads)
                continue
            numbers, room = adapters.head_numbers[begin : begin + rows.numel()], adapters.rows(rows.numel())
            self._library.multiply(
                self._c_buffers[NORMED], weight, part, self._threads, adapters.head_table, numbers, room
            )
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

    def install(self) -> None:
        self._model.install_adapters(self._adapters)


# Of what a spec may say beside a Llama or GPT-2 block, what the kernel does.
KNOWN_DIFFERENCES = frozenset({"attention_multiplier"})


def unsupported(spec: ModelSpec) -> str | None:
    """What of the architecture the kernel does not do; None: it does all of it."""
    for name in spec.differences():
        if name not in KNOWN_DIFFERENCES:
            value = getattr(spec, name)
            shown = f" = {value!r}" if isinstance(value, str | int | float) else ""
            return f"it does not do {name}{shown}"
    norm, positions = spec.norm, spec.positions
    if not norm.weight or norm.offset or norm.has_bias != (norm.kind == "layer"):
        return f"it does not do {norm}"
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
