"""Computes a step of an encoder: whole inputs, hidden states, what each request reads of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from salver.model.adapters import AdapterSet
from salver.model.encoder import Encoder, EncoderBatch, Masks, SelfAttention, build_encoder_batch
from salver.server.engine.core import RowResult, StepResult
from salver.server.engine.readouts import Dense, put_attention, read_states
from salver.server.engine.request import EncodingParams, Readout
from salver.server.engine.runner import within_memory
from salver.server.engine.schedule import Schedule, Scheduled

if TYPE_CHECKING:
    from salver.model.kernels.encoder_program import NativeEncoder

# A vocabulary head's rows are long: so many of them at a time.
CANDIDATE_ROWS = 64


class EncoderRunner:
    """Owns the model. Every scheduled part is a whole input with `encoding`."""

    def __init__(
        self,
        model: Encoder | NativeEncoder,
        *,
        row_multiple: int,
        dense: Dense | None = None,
        on_progress: Callable[[], None] | None = None,
        adapters: AdapterSet | None = None,
    ) -> None:
        """Without `adapters`, no request may have one."""
        self.model = model
        self.adapters = adapters
        self.row_multiple = row_multiple
        self.device = model.device
        self._dense = dense
        self._on_progress = on_progress

    @property
    def has_dense(self) -> bool:
        """Whether pooled vectors go through dense modules of the checkpoint."""
        return self._dense is not None

    def execute(self, schedule: Schedule) -> StepResult:
        """Computes one step; an input whose answer is not numbers fails alone. Raises OutOfMemory."""
        return within_memory(self._compute, schedule, self.device)

    @torch.inference_mode()
    def _compute(self, schedule: Schedule) -> StepResult:
        # Equal lengths side by side are one call of attention.
        order = sorted(range(len(schedule.scheduled)), key=lambda i: schedule.scheduled[i].num_tokens)
        items = [schedule.scheduled[i] for i in order]
        begin = time.perf_counter()
        batch = self._batch([item.token_ids for item in items], [_encoding(item).segments for item in items])
        if self.adapters is not None:
            self.adapters.select(
                [
                    (item.sequence.request.adapter, range(*bounds))
                    for item, bounds in zip(items, itertools.pairwise(batch.cu_seqlens), strict=True)
                ]
            )
        weights: dict[int, list[Tensor]] = {
            i: [] for i, item in enumerate(items) if _encoding(item).readout is Readout.ATTENTION
        }

        def observe(layer: int, attention: SelfAttention, heads: Tensor, masks: Masks) -> None:
            for i, found in weights.items():
                if layer in _encoding(items[i]).layers:
                    first = batch.cu_seqlens[i]
                    rows, wanted = heads[first : batch.cu_seqlens[i + 1]], list(_encoding(items[i]).heads)
                    found.append(attention.weights(rows, wanted, masks, first).cpu())

        hidden = self.model(batch, self._on_progress, observe if weights else None)
        duration = time.perf_counter() - begin
        sorted_results = [RowResult() for _ in items]
        self._read(items, batch.cu_seqlens, hidden, sorted_results)
        for i, found in weights.items():
            put_attention(torch.stack(found).numpy(), sorted_results[i])
        results = [RowResult() for _ in items]
        for i, result in zip(order, sorted_results, strict=True):
            results[i] = result
        return StepResult(results, duration)

    def _batch(self, inputs: Sequence[Sequence[int]], segments: Sequence[Sequence[int]]) -> EncoderBatch:
        return build_encoder_batch(
            self.model.spec, inputs, segments, row_multiple=self.row_multiple, device=self.device
        )

    def _read(
        self, items: list[Scheduled], bounds: list[int], hidden: Tensor, results: list[RowResult]
    ) -> None:
        states = [i for i, item in enumerate(items) if _reads_states(item)]
        if states:
            rows = hidden.float().cpu().numpy()
            for i in states:
                read_states(items[i], rows[bounds[i] : bounds[i + 1]], results[i], self._dense)
        scored = [i for i, item in enumerate(items) if _encoding(item).readout is Readout.SCORES]
        if scored:
            self._read_scores(scored, items, bounds, hidden, results)
        for i, item in enumerate(items):
            if _encoding(item).readout is Readout.CANDIDATES:
                self._read_candidates(item, hidden[bounds[i] : bounds[i + 1]], results[i])

    def _read_scores(
        self,
        scored: list[int],
        items: list[Scheduled],
        bounds: list[int],
        hidden: Tensor,
        results: list[RowResult],
    ) -> None:
        """The head's answers of all inputs by one product."""
        head = self.model.spec.head
        assert head is not None
        parts = [hidden[bounds[i] : bounds[i + 1]] for i in scored]
        if head.reads == "input":
            parts = [part[:1] if head.pooling == "cls" else part.mean(0, keepdim=True) for part in parts]
        names = [
            items[i].sequence.request.adapter for i, part in zip(scored, parts, strict=True) for _ in part
        ]
        found = self._scores(torch.cat(parts), names).cpu().numpy()
        first = 0
        for i, part in zip(scored, parts, strict=True):
            rows = found[first : first + len(part)]
            first += len(part)
            if not np.isfinite(rows).all():
                results[i].error = "the head's scores are not numbers"
            else:
                results[i].arrays = (rows[0] if head.reads == "input" else rows,)

    def _read_candidates(self, item: Scheduled, hidden: Tensor, result: RowResult) -> None:
        """The most probable tokens at the positions asked for, by the vocabulary head."""
        encoding, adapter = _encoding(item), item.sequence.request.adapter
        targets = torch.tensor(encoding.targets, dtype=torch.int64, device=self.device)
        ids, values, wanted = [], [], []
        for begin in range(0, len(encoding.positions), CANDIDATE_ROWS):
            rows = list(encoding.positions[begin : begin + CANDIDATE_ROWS])
            logprobs = self._scores(hidden[rows], [adapter] * len(rows)).log_softmax(dim=-1)
            if not bool(torch.isfinite(logprobs).any(dim=-1).all()):
                result.error = "the head's logits are not numbers"
                return
            # Equal ones by id, as a sort that keeps the order gives them.
            top = logprobs.sort(dim=-1, descending=True, stable=True)
            ids.append(top.indices[:, : encoding.top_k])
            values.append(top.values[:, : encoding.top_k])
            wanted.append(logprobs[:, targets])
        result.arrays = tuple(torch.cat(parts).cpu().numpy() for parts in (ids, values, wanted))

    def _scores(self, rows: Tensor, names: list[str]) -> Tensor:
        """[R, head.size] of hidden rows under the adapters of these names, padded for the product."""
        if self.adapters is not None:
            self.adapters.select_heads(names)
        padding = -len(rows) % self.row_multiple
        padded = torch.cat((rows, rows.new_zeros((padding, rows.shape[1])))) if padding else rows
        return self.model.scores(padded)[: len(rows)]

    @torch.inference_mode()
    def measure(self, lengths: Sequence[int]) -> float:
        """Seconds of a step of inputs this long; also warms the kernels up."""
        batch = self._batch([[0] * length for length in lengths], [()] * len(lengths))
        begin = time.perf_counter()
        self.model(batch, self._on_progress)[0, 0].item()  # the read waits for the device
        return time.perf_counter() - begin


def _encoding(item: Scheduled) -> EncodingParams:
    encoding = item.sequence.request.encoding
    assert encoding is not None, "an encoder was given a request that asks for tokens"
    return encoding


def _reads_states(item: Scheduled) -> bool:
    return _encoding(item).readout in (Readout.TOKENS, Readout.EMBEDDING)
