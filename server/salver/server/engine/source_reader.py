"""The encoder's part of a step: sources that begin are read, and rows are told where theirs are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from salver.model.adapters import AdapterSet
from salver.model.attention import AttentionBatch, into_slots, over_sources
from salver.model.cache import KVCache
from salver.model.encoder import Masks, OnHeads, SelfAttention, build_encoder_batch
from salver.model.transformer import SourceDecoder
from salver.server.engine.schedule import Scheduled
from salver.server.engine.sequence import Sequence as EngineSequence

# Is told, of each source that is read, its sequence, the encoder's layer, its attention, its heads
# [n, 3, heads, head_dim] and masks.
OnSource = Callable[[EngineSequence, int, SelfAttention, Tensor, Masks], None]


class SourceReader:
    """Owns the encoder of an encoder-decoder, and writes into the decoder's cache."""

    def __init__(
        self,
        model: SourceDecoder,
        cache: KVCache,
        *,
        row_multiple: int,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        assert model.spec.encoder is not None
        self._model = model
        self._spec = model.spec.encoder
        self._cache = cache
        self._row_multiple = row_multiple
        self._on_progress = on_progress

    def replace_model(self, model: SourceDecoder) -> None:
        """Reads with another model of the same spec from now on."""
        self._model = model

    def read(
        self,
        items: Sequence[Scheduled],
        adapters: AdapterSet | None = None,
        on_source: OnSource | None = None,
    ) -> None:
        """Reads the sources that these parts begin with, under their adapters.

        Whose the rows of the decoder's step are is forgotten.
        """
        # Equal lengths side by side are one call of attention.
        new = sorted((item for item in items if item.reads_source), key=lambda item: item.num_source_tokens)
        if not new:
            return
        sequences = [item.sequence for item in new]
        if adapters is not None:
            adapters.select_sources([(s.request.adapter, s.num_source_tokens) for s in sequences])
        bounds = [0, *itertools.accumulate(sequence.num_source_tokens for sequence in sequences)]

        def tell(layer: int, attention: SelfAttention, heads: Tensor, masks: Masks) -> None:
            assert on_source is not None
            for sequence, (begin, end) in zip(sequences, itertools.pairwise(bounds), strict=True):
                on_source(sequence, layer, attention, heads[begin:end], masks)

        self._encode(
            [sequence.request.source_token_ids for sequence in sequences],
            [sequence.cross_table for sequence in sequences],
            None if on_source is None else tell,
        )

    def keys(self, sequence: EngineSequence, layer: int) -> Tensor:
        """float32 [n, kv_heads, head_dim]: what a layer of the decoder compares queries with."""
        found = self._model.source_keys(self._cache, layer, sequence.cross_table)
        return found[: sequence.num_source_tokens]

    def attach(self, batch: AttentionBatch, items: Sequence[Scheduled]) -> None:
        """Tells the rows of a step where their sources are."""
        sequences = [item.sequence for item in items]
        lengths = [sequence.num_source_tokens for sequence in sequences]
        batch.source = over_sources(batch, [sequence.cross_table for sequence in sequences], lengths)

    def _encode(
        self,
        sources: Sequence[Sequence[int]],
        tables: Sequence[Sequence[int]],
        on_heads: OnHeads | None = None,
    ) -> None:
        lengths, device = list(map(len, sources)), self._model.device
        inputs = [list(source) for source in sources]
        batch = build_encoder_batch(
            self._spec, inputs, [()] * len(inputs), row_multiple=self._row_multiple, device=device
        )
        slots = into_slots(tables, lengths, batch.token_ids.numel(), self._cache.block_size, device)
        self._model.encode(batch, self._cache, slots, self._on_progress, on_heads)

    # ---- for measurements, all in the null block ----

    def attach_nothing(self, batch: AttentionBatch) -> None:
        """Every sequence has a source of one token."""
        count = len(batch.seq_lens)
        batch.source = over_sources(batch, [[0]] * count, [1] * count)

    def measure(self, num_tokens: int) -> float:
        """Seconds in which a source this long is read, or several where the encoder reads fewer at once."""
        most, size = self._spec.max_input_tokens, self._cache.block_size
        lengths = [min(most, num_tokens - begin) for begin in range(0, num_tokens, most)]
        begin = time.perf_counter()
        self._encode([[0] * length for length in lengths], [[0] * -(-length // size) for length in lengths])
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter() - begin
