"""An encoder as a program of the native kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoder import Encoder, EncoderBatch, EncoderLayer, OnHeads, relative_buckets
from ..encoder_spec import EncoderSpec
from ..layers import Norm
from ..rope import Rope
from .build import KernelUnavailable, pairs_are_fast
from .compiled import (
    ATTENDED,
    FINAL,
    HEADS,
    INNER,
    NORMED,
    PROGRESS_ROWS,
    RESIDUAL,
    Buffer,
    Compiled,
)
from .library import (
    ACTIVATIONS,
    LANES,
    MAX_HEAD_DIM,
    MAX_WIDTH,
    TILE,
    CCache,
    CStep,
    Epilogue,
    Kind,
    Library,
    Precision,
    Progress,
)
from .linear import check_head, use_native_head

EMBEDDED, NARROW_EMBEDDED = 8, 9  # buffers beside those of every program
FIRST_ROWS = 64

# Of what a spec may say, what the kernel does, or what does not concern it.
KNOWN = frozenset(
    {
        *("architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"),
        *("max_input_tokens", "norm", "activation", "weights", "head", "labels", "problem_type"),
        *("rank_activation", "embedding_size", "embedding_projection", "num_segments", "positions", "rope"),
        *("local_rope", "buckets", "windows", "layer_order", "pre_norm", "first_norm", "final_norm", "gated"),
        *("qkv_bias", "attention_out_bias", "mlp_bias", "pad_token_id", "mask_token_id"),
    }
)


class NativeEncoder(Compiled):
    """An `Encoder` whose steps the kernel computes; takes over its weights.

    Calls are those of `Encoder`. Hidden states are float32. An input has the same bits whatever stands
    beside it, in every precision. Its head computes in the precision that it was loaded in.
    """

    def __init__(
        self,
        model: Encoder,
        library: Library,
        *,
        precision: Precision,
        threads: int,
        pairs: bool | None = None,
    ) -> None:
        """`pairs` as of `NativeTransformer`.

        Raises KernelUnavailable for a model that the kernel does not know, before it takes anything.
        """
        spec = model.spec
        check(model)
        super().__init__(library, precision, threads, pairs_are_fast() if pairs is None else pairs)
        self.spec: EncoderSpec = spec
        self._model = model
        self._parameters = model.num_parameters()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        size = spec.embedding_size or hidden
        self._buffers = [
            *self._make_buffers(hidden, 3 * hidden, hidden, inner),
            Buffer(size, Precision.FLOAT32),
            Buffer(size, self._inputs),
        ]
        use_native_head(model, library, threads)
        self._bias = self._distance_bias(model)
        self._compile(model)
        self._program.cache = CCache(
            heads=spec.num_heads, kv_heads=spec.num_heads, head_dim=spec.head_dim,
            scale=1 / math.sqrt(spec.head_dim),
        )  # fmt: skip
        self._reserve(FIRST_ROWS)

    def num_parameters(self) -> int:
        """Weights; a tied matrix counts once."""
        return self._parameters

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weights, those of the head too."""
        model = self._model
        others = [module for module in (model.head, model.buckets) if module is not None]
        return [*super().stored(), *(tensor for m in others for tensor in (*m.parameters(), *m.buffers()))]

    # ---- the program ----

    def _compile(self, model: Encoder) -> None:
        spec = self.spec
        embedded = EMBEDDED if model.embedding_projection is not None else RESIDUAL
        positions = -1 if model.positions is None else self._table(model.positions)
        self._add(Kind.EMBED, embedded, embedded, weight=self._table(model.embed), extra=positions)
        if model.segments is not None:
            self._add(Kind.ADD_SEGMENTS, embedded, embedded, weight=self._table(model.segments))
        self._norm(model.embedding_norm, embedded, embedded)
        if model.embedding_projection is not None:
            self._add(Kind.QUANTIZE, EMBEDDED, NARROW_EMBEDDED)
            self._add(
                Kind.MULTIPLY, NARROW_EMBEDDED, RESIDUAL, weight=self._weight(model.embedding_projection)
            )
        packed: dict[int, tuple[int, ...]] = {}
        for step, index in enumerate(spec.order):
            layer = model.layers[index]
            assert isinstance(layer, EncoderLayer)
            if index not in packed:  # ALBERT's layers come again
                packed[index] = (
                    *map(self._weight, (layer.qkv, layer.attention_out, layer.down)),
                    self._weight(layer.up, gated=spec.gated),
                )
            self._layer(layer, packed[index], spec.window(step))
        if model.final_norm is not None:
            self._norm(model.final_norm, RESIDUAL, FINAL)

    def _layer(self, layer: EncoderLayer, weights: tuple[int, ...], window: int) -> None:
        qkv, attention_out, down, up = weights
        before, after = layer.pre_norm, not layer.pre_norm
        norm = layer.attention_norm
        self._read(layer.attention_norm if before else None, qkv, HEADS)
        if self.spec.rope is not None:
            self._add(Kind.ROTATE, HEADS, HEADS, window=window)
        reach = self.spec.max_input_tokens
        self._add(Kind.ATTEND_WHOLE, HEADS, self._first(ATTENDED), extra=reach, window=window)
        if self._bias is not None:
            self._operations[-1].scale = self._bias.data_ptr()
        # Here all threads meet anyway, and the heads are in their buffer still.
        self._add(Kind.PROGRESS, RESIDUAL, RESIDUAL)
        self._narrow(ATTENDED)
        self._add(Kind.MULTIPLY, ATTENDED, RESIDUAL, weight=attention_out, epilogue=Epilogue.ADD)
        if after and norm is not None:
            self._norm(norm, RESIDUAL, RESIDUAL)
        epilogue = Epilogue.GATED if self.spec.gated else Epilogue.ACTIVATE
        activation = ACTIVATIONS[self.spec.activation]
        self._read(layer.mlp_norm if before else None, up, self._first(INNER), epilogue, activation)
        self._narrow(INNER)
        self._add(Kind.MULTIPLY, INNER, RESIDUAL, weight=down, epilogue=Epilogue.ADD)
        if after:
            self._norm(layer.mlp_norm, RESIDUAL, RESIDUAL)

    def _read(
        self,
        norm: Norm | None,
        weight: int,
        out: int,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
    ) -> None:
        """A product of the residual, normed or as it is."""
        source = NORMED
        if norm is not None:
            self._norm(norm, RESIDUAL, NORMED)
        elif self._inputs is Precision.FLOAT32:
            source = RESIDUAL
        else:
            self._add(Kind.QUANTIZE, RESIDUAL, NORMED)
        self._add(Kind.MULTIPLY, source, out, weight=weight, epilogue=epilogue, activation=activation)

    def _distance_bias(self, model: Encoder) -> Tensor | None:
        """float32 [heads, 2 max_input_tokens + TILE] of the distances from -max_input_tokens on, if any."""
        if model.buckets is None:
            return None
        assert self.spec.buckets is not None
        reach = self.spec.max_input_tokens
        buckets = relative_buckets(torch.arange(-reach, reach + TILE), self.spec.buckets)
        found: Tensor = F.embedding(buckets, model.buckets.weight.float()).T
        return (found * math.log2(math.e)).contiguous()

    # ---- steps ----

    def __call__(
        self,
        batch: EncoderBatch,
        on_layer: Callable[[], None] | None = None,
        on_heads: OnHeads | None = None,
    ) -> Tensor:
        """As `Encoder.forward`; hidden states float32 [N, hidden_size], valid until the next step."""
        rows = batch.token_ids.numel()
        self._reserve(rows)
        starts = torch.tensor(batch.cu_seqlens, dtype=torch.int32)
        step = CStep(
            num_rows=rows,
            num_sequences=starts.numel() - 1,
            token_ids=batch.token_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            segments=batch.segments.data_ptr(),
            query_starts=starts.data_ptr(),
        )
        angles = [
            _angles(rope, batch.positions) for rope in (self._model.rope, self._model.local_rope) if rope
        ]
        if angles:
            (cos, sin), (local_cos, local_sin) = angles
            step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
            step.local_cos, step.local_sin = local_cos.data_ptr(), local_sin.data_ptr()
        told = Progress(on_layer) if on_layer is not None and rows >= PROGRESS_ROWS else Progress()
        if on_heads is not None:
            told = Progress(self._heads_told(rows, on_heads, on_layer))
        self._library.run(self._program, step, self._threads, told)
        if on_layer is not None:
            on_layer()
        return self._tensors[FINAL if self.spec.final_norm else RESIDUAL][:rows]

    def _heads_told(
        self, rows: int, on_heads: OnHeads, on_layer: Callable[[], None] | None
    ) -> Callable[[], None]:
        """What the kernel calls after each layer's attention: its rotated heads are in their buffer."""
        spec, steps = self.spec, itertools.count()
        heads = self._tensors[HEADS][:rows].view(rows, 3, spec.num_heads, spec.head_dim)
        masks = self._model.masks(heads)

        def tell() -> None:
            step = next(steps)
            layer = self._model.layers[spec.order[step]]
            assert isinstance(layer, EncoderLayer)
            on_heads(step, layer.attention, heads, masks[spec.window(step)])
            if on_layer is not None:
                on_layer()

        return tell

    def scores(self, rows: Tensor) -> Tensor:
        """float32 [R, head.size] of hidden rows [R, hidden_size], by the head."""
        return self._model.scores(rows)


def _angles(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, head_dim / 2]."""
    rotation = rope.rotation(positions, None, torch.float32)
    return rotation.cos[:, 0, 0].contiguous(), rotation.sin[:, 0, 1].contiguous()


def unsupported(spec: EncoderSpec) -> str | None:
    """What of the architecture the kernel does not do; None: it does all of it."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name not in KNOWN and value != field.default:
            shown = f" = {value!r}" if isinstance(value, str | int | float) else ""
            return f"it does not do {field.name}{shown}"
    if not spec.norm.weight or spec.norm.offset:
        return f"it does not do {spec.norm}"
    for rope in (spec.rope, spec.local_rope):
        if rope is not None and (rope.grows or rope.rotary_dim not in (0, spec.head_dim)):
            return f"it does not do {rope!r:.80}"
    if spec.activation not in ACTIVATIONS:
        return f"it does not know the activation {spec.activation}"
    if spec.head_dim % LANES or spec.head_dim > MAX_HEAD_DIM:
        return f"heads of {spec.head_dim} are not a multiple of {LANES} up to {MAX_HEAD_DIM}"
    return None


def check(model: Encoder) -> None:
    """Raises KernelUnavailable, saying what of the model the kernel does not do."""
    spec = model.spec
    if (reason := unsupported(spec)) is not None:
        raise KernelUnavailable(reason)
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        raise KernelUnavailable(f"it computes float32 and bfloat16 on the CPU, not {model.dtype}")
    for size in (spec.embedding_size or 4, 3 * spec.hidden_size, 2 * spec.intermediate_size):
        if size % 4 or size > MAX_WIDTH:
            raise KernelUnavailable(f"a width of {size} is not a multiple of 4 up to {MAX_WIDTH}")
    check_head(model)
