"""Computes a step on the device: batch, forward pass, sampling, checking of drafts, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from salver.model.adapters import AdapterSet
from salver.model.attention import AttentionBatch, Scoring
from salver.model.cache import KVCache
from salver.model.sampling import (
    INVALID,
    SamplingRow,
    TokenLogprobs,
    candidates,
    distributions,
    sample,
    token_logprobs,
)
from salver.model.transfer import tensor_on
from salver.model.transformer import Classifying, Decoder, OnAttention, SourceDecoder
from salver.server.engine.attention_rows import AttentionRows, source_observer
from salver.server.engine.batch import Batch, Part, build_batch
from salver.server.engine.beam import Candidate, num_candidates
from salver.server.engine.core import RowResult, StepResult
from salver.server.engine.errors import OutOfMemory
from salver.server.engine.graphs import DecodeGraphs
from salver.server.engine.readouts import Dense, distribution_arrays, read_scores, read_states
from salver.server.engine.request import AttentionOf, EncodingParams, EngineRequest, Logprobs, Readout
from salver.server.engine.schedule import Schedule, Scheduled
from salver.server.engine.sequence import Sequence
from salver.server.engine.source_reader import SourceReader

if TYPE_CHECKING:  # a machine without its library can still compute everything else
    from salver.server.engine.grammar import Grammars, Mask

# Prompt log-probabilities need the logits of every position: so many rows at a time.
LOGPROB_ROWS = 64


class ModelRunner:
    """Owns the model and its cache."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        block_size: int,
        row_multiple: int,
        on_progress: Callable[[], None] | None = None,
        dense: Dense | None = None,
        grammars: Grammars | None = None,
        adapters: AdapterSet | None = None,
        sources: SourceReader | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """Without `grammars` or `adapters`, no request may have one; `sources` of an encoder-decoder.
        `graphs` run what they can.
        """
        self.model = model
        self.cache = cache
        self._dense = dense
        self.block_size = block_size
        self.row_multiple = row_multiple
        self.device = model.device
        self._on_progress = on_progress
        self.grammars = grammars
        self.adapters = adapters
        self.graphs = graphs
        self._sources = sources

    def replace_model(self, model: Decoder) -> None:
        """Computes with another model of the same spec and device from now on."""
        self.model = model
        if self._sources is not None:
            self._sources.replace_model(cast(SourceDecoder, model))

    def progress(self) -> None:
        """A sign of life, from between steps."""
        if self._on_progress is not None:
            self._on_progress()

    def execute(self, schedule: Schedule) -> StepResult:
        """Computes one step; a row whose logits are not numbers fails alone. Raises OutOfMemory."""
        return within_memory(self._compute, schedule, self.device)

    @torch.inference_mode()
    def _compute(self, schedule: Schedule) -> StepResult:
        if schedule.copies:
            self.cache.copy_blocks(schedule.copies)
        parts = [
            Part(item.token_ids, item.start, item.sequence.block_table, item.sequence.position_length)
            for item in schedule.scheduled
        ]
        batch = build_batch(parts, self.block_size, row_multiple=self.row_multiple, device=self.device)
        results = [RowResult() for _ in schedule.scheduled]
        observed = {
            i: AttentionRows(item, batch.first_rows[i])
            for i, item in enumerate(schedule.scheduled)
            if item.sequence.request.encoding is not None
            and item.sequence.request.encoding.readout is Readout.ATTENTION
        }

        def observe(layer: int, query: Tensor, key: Tensor | None, scoring: Scoring) -> None:
            for rows in observed.values():
                rows.take(layer, query, key, scoring)

        sampling = [i for i, item in enumerate(schedule.scheduled) if item.samples]
        beams = [i for i in sampling if schedule.scheduled[i].sequence.request.beams is not None]
        sampling = [i for i in sampling if schedule.scheduled[i].sequence.request.beams is None]
        masks = self._begin_masks([schedule.scheduled[i] for i in sampling])
        model_begin = time.perf_counter()
        ends = batch.attention.cu_seqlens_q
        rows = [
            row
            for i in (*sampling, *beams)
            for row in range(ends[i + 1] - 1 - len(schedule.scheduled[i].draft), ends[i + 1])
        ]
        try:
            if self._sources is not None:
                self._sources.read(schedule.scheduled, self.adapters, source_observer(observed.values()))
                self._sources.attach(batch.attention, schedule.scheduled)
            self._select_adapters(schedule, batch)
            looks = any(rows.of is not AttentionOf.SOURCE for rows in observed.values())
            hidden = self._forward(batch, observe if looks else None)
            logits = self.logits(hidden, rows)
        finally:
            wait([masks])  # it works on sequences that a failed step's halves need again
        model_duration = time.perf_counter() - model_begin
        num_beams = len(beams)
        self._sample(schedule, sampling, logits[: len(rows) - num_beams], masks.result(), results)
        if beams:
            self._offer(schedule, beams, logits[len(rows) - num_beams :], results)
        for i, (item, first_row) in enumerate(zip(schedule.scheduled, batch.first_rows, strict=True)):
            request = item.sequence.request
            if request.prompt_top_k is not None:
                self._prompt_logprobs(item, hidden, first_row, results[i])
            if i in observed:
                observed[i].read(results[i], self._sources)
            elif request.encoding is not None:
                self._read(item, request.encoding, hidden, first_row, results[i])
        return StepResult(results, model_duration)

    def _select_adapters(self, schedule: Schedule, batch: Batch) -> None:
        if self.adapters is not None:
            self.adapters.select(
                [
                    (item.sequence.request.adapter, range(first, first + item.num_tokens))
                    for item, first in zip(schedule.scheduled, batch.first_rows, strict=True)
                ]
            )

    def _forward(self, batch: Batch, on_attention: OnAttention | None) -> Tensor:
        """Hidden states [N, hidden_size]; without the rows of padding, where a graph computes them."""
        if self.graphs is not None and self.adapters is None and on_attention is None:
            hidden = self.graphs.run(batch)
            if hidden is not None:
                if self._on_progress is not None:
                    self._on_progress()
                return hidden
        return self.model(
            batch.token_ids, batch.positions, self.cache, batch.attention, on_layer=self._on_progress,
            on_attention=on_attention,
        )  # fmt: skip

    def _read(
        self, item: Scheduled, encoding: EncodingParams, hidden: Tensor, first_row: int, result: RowResult
    ) -> None:
        """What `encoding` asks for of the part's rows."""
        if encoding.readout is Readout.SCORES:
            classify = partial(self._classify, item.sequence.request.adapter)
            read_scores(item, self.model.spec, hidden, first_row, classify, result)
        elif encoding.readout is not Readout.DISTRIBUTION:
            states = hidden[first_row : first_row + item.num_tokens].float().cpu().numpy().copy()
            read_states(item, states, result, self._dense)
        elif item.start + item.num_tokens == item.sequence.num_tokens:
            logits = self.logits(hidden, [first_row + item.num_tokens - 1])[0]
            if not _are_numbers(logits):
                result.error = "the model's logits are not numbers"
                return
            mask = None if self.grammars is None else self.grammars.masks([(item.sequence, ())])[0]
            (row,) = sampling_rows(item.sequence, masks=mask)
            result.arrays = distribution_arrays(distributions(logits, row, encoding.top_k), encoding.top_k)

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """float32 [len(rows), vocab] of these rows of hidden [N, hidden_size]."""
        if not rows:
            return hidden.new_empty((0, self.model.spec.vocab_size), dtype=torch.float32)
        padded = rows + [0] * (-len(rows) % self.row_multiple)
        if self.adapters is not None:
            self.adapters.select_head(padded)
        index = tensor_on(self.device, padded, torch.int64)
        return self.model.logits(hidden.index_select(0, index))[: len(rows)]

    def _classify(self, adapter: str, rows: Tensor) -> Tensor:
        """float32 [R, labels] of hidden rows under an adapter, padded for the product."""
        padding = -len(rows) % self.row_multiple
        padded = torch.cat((rows, rows.new_zeros((padding, rows.shape[1])))) if padding else rows
        if self.adapters is not None:
            self.adapters.select_heads([adapter] * len(padded))
        assert isinstance(self.model, Classifying)
        return self.model.classify(padded)[: len(rows)]

    def _begin_masks(self, items: list[Scheduled]) -> Future[list[Mask | None]]:
        """What the grammars allow after each of these, begun beside the model."""
        if self.grammars is not None:
            return self.grammars.begin([(item.sequence, item.draft) for item in items])
        nothing: Future[list[Mask | None]] = Future()
        nothing.set_result([None] * len(items))
        return nothing

    def _sample(
        self,
        schedule: Schedule,
        sampling: list[int],
        logits: Tensor,
        masks: list[Mask | None],
        results: list[RowResult],
    ) -> None:
        """Chooses a token after each sequence's newest one and after each of its drafts, [R] rows in all.

        The token after a draft counts if the draft is the token that was chosen in its place.
        """
        if not sampling:
            return
        items = [schedule.scheduled[i] for i in sampling]
        chosen = sample(
            logits,
            [
                row
                for item, mask in zip(items, masks, strict=True)
                for row in sampling_rows(item.sequence, item.draft, mask)
            ],
        )
        wanted: list[tuple[int, EngineRequest]] = []  # rows of logits, and who asks for log-probabilities
        asking: list[RowResult] = []
        first_row = 0
        for i, item in zip(sampling, items, strict=True):
            result, num_rows = results[i], len(item.draft) + 1
            result.token_ids = agreed(chosen[first_row : first_row + num_rows], item.draft)
            request = item.sequence.request
            if not result.token_ids:
                if _are_numbers(logits[first_row]):
                    result.exhausted = True
                else:
                    result.error = "the model's logits are not numbers"
            elif request.output_top_k is not None:
                wanted += [(first_row + row, request) for row in range(len(result.token_ids))]
                asking.append(result)
            first_row += num_rows
        if wanted:
            rows = [row for row, _ in wanted]
            found = token_logprobs(
                logits[rows],
                [chosen[row] for row in rows],
                [request.output_top_k or 0 for _, request in wanted],
                [request.logprob_token_ids for _, request in wanted],
            )
            told = iter(found)
            for result in asking:
                result.logprobs = [_logprobs(next(told)) for _ in result.token_ids]

    def _offer(self, schedule: Schedule, beams: list[int], logits: Tensor, results: list[RowResult]) -> None:
        """Finds what may follow each beam, [len(beams)] rows."""
        sequences = [schedule.scheduled[i].sequence for i in beams]
        counts = [num_candidates(s.request.beams, s.request.stopping) for s in sequences if s.request.beams]
        found = candidates(logits, [sampling_rows(s)[0] for s in sequences], counts)
        for row, (i, sequence, pairs) in enumerate(zip(beams, sequences, found, strict=True)):
            request = sequence.request
            if sequence.end_is_forced(sequence.num_output_tokens):
                pairs = [(token_id, 0.0) for token_id, _ in pairs]  # as in transformers: it is sure
            if not _are_numbers(logits[row]):
                results[i].error = "the model's logits are not numbers"
            elif request.output_top_k is None:
                results[i].candidates = [Candidate(token_id, score) for token_id, score in pairs]
            else:
                told = token_logprobs(
                    logits[row].expand(len(pairs), -1),
                    [token_id for token_id, _ in pairs],
                    [request.output_top_k] * len(pairs),
                    [request.logprob_token_ids] * len(pairs),
                )
                results[i].candidates = [
                    Candidate(token_id, score, _logprobs(logprobs))
                    for (token_id, score), logprobs in zip(pairs, told, strict=True)
                ]

    def _prompt_logprobs(self, item: Scheduled, hidden: Tensor, first_row: int, result: RowResult) -> None:
        """Row p's logits score the token at p + 1; each position is told once, also after a preemption."""
        sequence = item.sequence
        first = max(item.start + 1, sequence.next_prompt_logprob)
        last = min(item.start + item.num_tokens, sequence.num_prompt_tokens - 1)
        if first > last:
            return
        result.prompt_logprobs = []
        top_k = sequence.request.prompt_top_k or 0
        for begin in range(first, last + 1, LOGPROB_ROWS):
            positions = range(begin, min(begin + LOGPROB_ROWS, last + 1))
            logits = self.logits(hidden, [first_row + p - 1 - item.start for p in positions])
            if not bool(torch.isfinite(logits).any(dim=-1).all()):
                result.error = "the model's logits are not numbers"
                return
            targets = [sequence.token_ids[p] for p in positions]
            found = token_logprobs(logits, targets, [top_k] * len(targets))
            result.prompt_logprobs += [_logprobs(logprobs) for logprobs in found]
            if self._on_progress:
                self._on_progress()

    @torch.inference_mode()
    def measure_decode(self, num_sequences: int) -> float:
        """Seconds of a step in which so many sequences choose a token, all in the null block."""
        parts = [Part([0], 0, [0]) for _ in range(num_sequences)]
        batch = build_batch(parts, self.block_size, row_multiple=self.row_multiple, device=self.device)
        if self._sources is not None:
            self._sources.attach_nothing(batch.attention)
        begin = time.perf_counter()
        hidden = self.model(
            batch.token_ids, batch.positions, self.cache, batch.attention, on_layer=self._on_progress
        )
        self.logits(hidden, list(range(num_sequences))).argmax(dim=-1).tolist()  # waits for the device
        return time.perf_counter() - begin

    @torch.inference_mode()
    def measure_prefill(self, num_tokens: int) -> float:
        """Tokens a second of a prompt this long, all in the null block; also warms the kernels up.

        Of an encoder-decoder with more than one, of a source.
        """
        if self._sources is not None and num_tokens > 1:
            return num_tokens / self._sources.measure(num_tokens)
        attention = AttentionBatch(
            cu_seqlens_q=[0, num_tokens],
            seq_lens=[num_tokens],
            block_tables=torch.zeros((1, -(-num_tokens // self.block_size)), dtype=torch.int64).to(
                self.device
            ),
            slot_mapping=torch.arange(num_tokens, device=self.device) % self.block_size,
        )
        if self._sources is not None:
            self._sources.attach_nothing(attention)
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        positions = torch.arange(num_tokens, device=self.device)
        begin = time.perf_counter()
        hidden = self.model(token_ids, positions, self.cache, attention, on_layer=self._on_progress)
        self.logits(hidden, [0]).argmax().item()  # the read waits for the device
        return num_tokens / (time.perf_counter() - begin)

    @torch.inference_mode()
    def largest_step(self, num_tokens: int, num_sequences: int) -> None:
        """What a step of this size holds at once: rows of a long prompt, and of logits to draw from."""
        self.measure_prefill(num_tokens)
        rows = torch.zeros(
            (num_sequences, self.model.spec.hidden_size), dtype=self.cache.data.dtype, device=self.device
        )
        row = SamplingRow(
            temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, logit_bias=(), seed=0, sample_index=0, prompt_token_ids=(0,),
            output_token_ids=(),
        )  # fmt: skip
        sample(self.logits(rows, list(range(num_sequences))), [row] * num_sequences)


_R = TypeVar("_R")


def within_memory(compute: Callable[[Schedule], _R], schedule: Schedule, device: torch.device) -> _R:
    """`compute(schedule)`. Raises OutOfMemory, with the failed step's memory free again."""
    try:
        return compute(schedule)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "out of memory"
    # Out of the except block, whose traceback holds the failed step's tensors.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(reason)


def is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator has no exception class of its own, only its name in a RuntimeError's text."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _are_numbers(logits: Tensor) -> bool:
    """Whether a token could be chosen from these [V], if nothing forbade it."""
    return bool(logits.isfinite().any()) and not bool(logits.isnan().any())


def sampling_rows(
    sequence: Sequence, draft: tuple[int, ...] = (), masks: Mask | None = None
) -> list[SamplingRow]:
    """How the tokens after the newest one and after each draft are chosen: as if they stood there.

    `masks`: what the grammar allows at each of them.
    """
    request = sequence.request
    sampling, stopping = request.sampling, request.stopping
    output = [*sequence.token_ids[sequence.num_prompt_tokens :], *draft]
    first = sequence.num_output_tokens
    return [
        _forced(stopping.forced_eos_token_id, sequence, output[:length])
        if stopping.forced_eos_token_id is not None and sequence.end_is_forced(length)
        else SamplingRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            seed=sampling.seed,
            sample_index=sequence.sample_index,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=output[:length],
            banned_token_ids=stopping.stop_token_ids if length < stopping.min_tokens else (),
            typical_p=sampling.typical_p,
            bad_words=sampling.bad_words,
            allowed_words=sampling.allowed_words,
            allowed_token_ids=sampling.allowed_token_ids,
            stop_token_ids=stopping.stop_token_ids,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            mask=None if masks is None else masks[length - first],
        )
        for length in range(first, len(output) + 1)
    ]


def _forced(token_id: int, sequence: Sequence, output: list[int]) -> SamplingRow:
    """Nothing but this token can be chosen."""
    sampling = sequence.request.sampling
    return SamplingRow(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias=(),
        seed=sampling.seed,
        sample_index=sequence.sample_index,
        prompt_token_ids=(),
        output_token_ids=output,
        allowed_token_ids=(token_id,),
    )


def agreed(chosen: list[int], draft: tuple[int, ...]) -> list[int]:
    """The tokens chosen up to the first that is not its draft, which is the last one that counts.

    One that could not be chosen ends them too: the next step meets it again, as its first.
    """
    token_ids: list[int] = []
    for i, token_id in enumerate(chosen):
        if token_id == INVALID:
            break
        token_ids.append(token_id)
        if draft[i : i + 1] != (token_id,):
            break
    return token_ids


def _logprobs(found: TokenLogprobs) -> Logprobs:
    return Logprobs(found.token_id, found.logprob, found.rank, found.top, found.named)
