"""Computes steps on a device that works beside the host; see `overlap`."""

from __future__ import annotations

import time
from typing import cast

import torch
from torch import Tensor

from salver.model.sampling import INVALID, choose
from salver.model.transfer import tensor_on
from salver.server.engine.batch import Batch, Part, build_batch
from salver.server.engine.core import RowResult, StepResult
from salver.server.engine.overlap import Flight
from salver.server.engine.runner import ModelRunner, sampling_rows, within_memory
from salver.server.engine.schedule import Schedule
from salver.server.engine.sequence import PENDING, Sequence


class _Moment:
    """Now, on the device: an event of a GPU's stream; on a CPU, which is never behind, the time."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: _Moment) -> float:
        """Seconds; both have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1000


class DeviceFlight:
    """A launched step: its tokens on the device, and a copy of them on its way here."""

    def __init__(
        self, schedule: Schedule, tokens: Tensor, numbers: Tensor, begin: _Moment, end: _Moment
    ) -> None:
        """`tokens` int64 and `numbers` bool, both [S] of the sequences that sample, in their order."""
        self.tokens = tokens
        self.rows: dict[Sequence, int] = {}
        self._schedule = schedule
        for item in schedule.scheduled:
            if item.samples:
                self.rows[item.sequence] = len(self.rows)
        self._samples = [item.samples for item in schedule.scheduled]
        self._begin, self._end = begin, end
        both = torch.stack((tokens, numbers.to(tokens.dtype)))
        if tokens.device.type == "cuda":
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
        else:
            self._host = both
        self._copied = _Moment(tokens.device)

    def result(self) -> StepResult:
        """Waits for the device."""
        self._copied.wait()
        chosen, numbers = self._host.tolist()
        results = [RowResult() for _ in self._samples]
        row = 0
        for result, samples in zip(results, self._samples, strict=True):
            if not samples:
                continue
            if chosen[row] != INVALID:
                result.token_ids = [chosen[row]]
            elif numbers[row]:
                result.exhausted = True
            else:
                result.error = "the model's logits are not numbers"
            row += 1
        return StepResult(results, self._end.since(self._begin))


class LaunchingModelRunner(ModelRunner):
    """A `ModelRunner` that also launches steps whose tokens depend on nothing but their number."""

    def launch(self, schedule: Schedule, previous: Flight | None) -> DeviceFlight:
        """See `overlap.LaunchingRunner`. No drafts, no grammars, no readouts. Raises OutOfMemory."""
        last = cast(DeviceFlight | None, previous)
        return within_memory(lambda step: self._launch(step, last), schedule, self.device)

    @torch.inference_mode()
    def _launch(self, schedule: Schedule, previous: DeviceFlight | None) -> DeviceFlight:
        if schedule.copies:
            self.cache.copy_blocks(schedule.copies)
        batch = self._batch(schedule, previous)
        self._select_adapters(schedule, batch)
        begin = _Moment(self.device)
        hidden = self._forward(batch, None)
        sampling = [i for i, item in enumerate(schedule.scheduled) if item.samples]
        ends = batch.attention.cu_seqlens_q
        logits = self.logits(hidden, [ends[i + 1] - 1 for i in sampling])
        end = _Moment(self.device)
        numbers = logits.isfinite().any(dim=-1) & ~logits.isnan().any(dim=-1)
        rows = [sampling_rows(schedule.scheduled[i].sequence)[0] for i in sampling]
        tokens = choose(logits, rows) if rows else torch.zeros(0, dtype=torch.int64, device=self.device)
        return DeviceFlight(schedule, tokens, numbers, begin, end)

    def _batch(self, schedule: Schedule, previous: DeviceFlight | None) -> Batch:
        """The step, with the tokens that are PENDING taken from the last one's on the device."""
        parts: list[Part] = []
        taken: list[int] = []  # of the last step's tokens
        places: list[int] = []  # rows of this step that they are for
        row = 0
        for item in schedule.scheduled:
            token_ids, sequence = item.token_ids, item.sequence
            if token_ids[-1] == PENDING:
                assert previous is not None, "a token is pending, and no step is in flight"
                token_ids[-1] = 0
                taken.append(previous.rows[sequence])
                places.append(row + len(token_ids) - 1)
            row += len(token_ids)
            parts.append(Part(token_ids, item.start, sequence.block_table, sequence.position_length))
        batch = build_batch(parts, self.block_size, row_multiple=self.row_multiple, device=self.device)
        if previous is not None and places:
            both = tensor_on(self.device, [places, taken], torch.int64)
            # A row that could choose no token ends; until that is read, some token stands for it.
            chosen = previous.tokens.index_select(0, both[1]).clamp(min=0)
            batch.token_ids.index_copy_(0, both[0], chosen)
        return batch
