"""A runner without a model that keeps the cache's books, and what it answers to a request alone.

It writes each token at its slot and, before it chooses the next one, reads the whole
sequence back through the block table, its source first, through the other one. So a wrong
block, a missed copy or a stale prefix changes a token. A token is a function of (source,
tokens so far, seed, sample) and of nothing else.
"""

from __future__ import annotations

import math
import random
from typing import Any

from salver.server.engine.beam import Answer, BeamSearch, Candidate, num_candidates
from salver.server.engine.core import RowResult, StepResult
from salver.server.engine.request import EngineRequest, Logprobs, SamplingParams, StoppingParams
from salver.server.engine.schedule import Schedule

BLOCK = 4  # tokens
VOCABULARY = 50


class Clock:
    """Moves on by itself a little at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def next_token(token_ids: list[int], seed: int, index: int) -> int:
    return random.Random(f"{token_ids} {seed} {index}").randrange(VOCABULARY)


def next_candidates(token_ids: list[int], item: EngineRequest) -> list[Candidate]:
    """What may follow a beam with these tokens: few likely ones, many unlikely ones."""
    assert item.beams is not None
    source = random.Random(f"{token_ids} {item.sampling.seed}")
    weights = [source.random() ** 4 + 1e-6 for _ in range(VOCABULARY)]
    total = sum(weights)
    best = sorted(range(VOCABULARY), key=lambda token: -weights[token])
    count = num_candidates(item.beams, item.stopping)
    return [Candidate(token, math.log(weights[token] / total)) for token in best[:count]]


class BookkeepingRunner:
    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.rows_computed = 0
        self.most_rows = 0

    def execute(self, schedule: Schedule) -> StepResult:
        contents = [
            [self.slots.get(source * BLOCK + i) for i in range(BLOCK)] for source, _ in schedule.copies
        ]
        for (_, destination), content in zip(schedule.copies, contents, strict=True):
            self.slots.update(
                {destination * BLOCK + i: token for i, token in enumerate(content) if token is not None}
            )
        self.most_rows = max(self.most_rows, schedule.num_tokens)
        self.rows_computed += schedule.num_tokens
        for item in schedule.scheduled:
            if item.reads_source:
                for position, token in enumerate(item.sequence.request.source_token_ids):
                    self.slots[self.slot(item.sequence.cross_table, position)] = token
        for item in schedule.scheduled:
            for position, token in enumerate(item.token_ids, item.start):
                self.slots[self.slot(item.sequence.block_table, position)] = token
        rows = []
        for item in schedule.scheduled:
            sequence = item.sequence
            end = item.start + item.num_tokens
            source = range(sequence.num_source_tokens)
            read = [self.slots[self.slot(sequence.cross_table, p)] for p in source]
            read += [self.slots[self.slot(sequence.block_table, p)] for p in range(end)]
            row = RowResult()
            if item.samples and sequence.request.beams is not None:
                row.candidates = next_candidates(read, sequence.request)
            elif item.samples:
                seed, index = sequence.request.sampling.seed, sequence.sample_index
                for guess in (*item.draft, None):
                    row.token_ids.append(
                        next_token(read[: len(read) - len(item.draft) + len(row.token_ids)], seed, index)
                    )
                    if row.token_ids[-1] != guess:
                        break
            if sequence.request.prompt_top_k is not None:
                first = max(item.start + 1, sequence.next_prompt_logprob)
                last = min(end, sequence.num_prompt_tokens - 1)
                row.prompt_logprobs = [
                    Logprobs(sequence.token_ids[p], -1.0, 1) for p in range(first, last + 1)
                ]
            rows.append(row)
        return StepResult(rows)

    @staticmethod
    def slot(table: list[int], position: int) -> int:
        assert table[position // BLOCK] != 0
        return table[position // BLOCK] * BLOCK + position % BLOCK


def request(
    request_id: int, prompt: list[int], max_tokens: int = 8, n: int = 1, **changes: Any
) -> EngineRequest:
    stop = changes.pop("stop", frozenset())
    changes.setdefault("sampling", SamplingParams(seed=request_id))
    return EngineRequest(
        request_id,
        tuple(prompt),
        stopping=StoppingParams(max_tokens, stop_token_ids=stop),
        sample_indices=tuple(range(n)),
        outputs=changes.pop("outputs", ((),) * n),
        **changes,
    )


def expected(item: EngineRequest, position: int) -> list[int]:
    """What the fake model gives for a sample of a request that has the engine for itself."""
    if item.beams is not None:
        return list(expected_answers(item)[item.sample_indices[position]].token_ids)
    index = item.sample_indices[position]
    tokens = [*item.source_token_ids, *item.prompt_token_ids, *item.outputs[position]]
    output = list(item.outputs[position])
    while len(output) < item.stopping.max_tokens:
        token = next_token(tokens, item.sampling.seed, index)
        tokens.append(token)
        output.append(token)
        if token in item.stopping.stop_token_ids:
            break
    return output[len(item.outputs[position]) :]


def expected_answers(item: EngineRequest) -> list[Answer]:
    """The same of a beam request: the search alone, without blocks, steps and neighbours."""
    assert item.beams is not None
    search = BeamSearch(item.beams, item.stopping)
    before = [*item.source_token_ids, *item.prompt_token_ids]
    while not search.ended:
        search.advance([next_candidates([*before, *beam.token_ids], item) for beam in search.beams])
    return search.answers
