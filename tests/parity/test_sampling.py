"""Processing steps against transformers' processors and warpers; the draw against its distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from salver.model.sampling import INVALID, SamplingRow, sample, token_logprobs
from salver.model.sampling.sampler import process

BASE = SamplingRow(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, logit_bias=(), seed=1, sample_index=0, prompt_token_ids=[1, 2, 3],
    output_token_ids=[3, 5, 5],
)  # fmt: skip


def some_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [50, 1000, 5000])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 5.0, "top_p": 0.95},
    ],
    ids=str,
)
def test_equal_to_transformers(changes: dict[str, float], vocab: int) -> None:
    row = replace(BASE, **changes)
    logits = some_logits(4, vocab)
    history = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]]).expand(4, -1)
    expected = logits.clone()
    if row.repetition_penalty != 1:
        expected = RepetitionPenaltyLogitsProcessor(row.repetition_penalty)(history, expected)
    expected = TemperatureLogitsWarper(row.temperature)(history, expected)
    if row.top_k:
        expected = TopKLogitsWarper(row.top_k)(history, expected)
    if row.top_p < 1:
        expected = TopPLogitsWarper(row.top_p)(history, expected)
    if row.min_p:
        expected = MinPLogitsWarper(row.min_p)(history, expected)
    before = logits.clone()
    found = process(logits, [row] * 4)
    assert torch.equal(logits, before), "the caller's logits are left as they are"
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-4)
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_penalties_and_bias_by_their_definitions() -> None:
    logits = some_logits(1, 20)
    row = replace(BASE, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((7, 2.5),), temperature=0.0)
    found = process(logits, [row])
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 0.25
    expected[0, 5] -= 0.5 + 2 * 0.25
    expected[0, 7] += 2.5
    torch.testing.assert_close(found, expected)


def test_banned_tokens_are_never_chosen() -> None:
    logits = some_logits(1, 20)
    best = int(logits.argmax())
    assert sample(logits, [replace(BASE, temperature=0.0)]) == [best]
    assert sample(logits, [replace(BASE, temperature=0.0, banned_token_ids=[best])]) != [best]


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0, "top_k": 6}, {"top_p": 0.7}], ids=str)
def test_drawn_as_distributed(changes: dict[str, float]) -> None:
    draws, vocab = 6000, 12
    logits = some_logits(1, vocab, seed=3)
    rows = [replace(BASE, seed=seed, output_token_ids=[], **changes) for seed in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows))
    expected = process(logits, rows[:1]).softmax(-1)[0].double()
    possible = expected > 0
    assert all(possible[token] for token in counts)
    observed = [counts[i] for i in range(vocab) if possible[i]]
    wanted = expected[possible] / expected[possible].sum() * draws
    assert stats.chisquare(observed, wanted.numpy()).pvalue > 1e-4


def test_a_row_does_not_know_its_neighbours() -> None:
    logits = some_logits(32, 3000, seed=5)
    kinds = [
        {}, {"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.8}, {"top_p": 0.99999, "temperature": 4.0},
        {"min_p": 0.05}, {"repetition_penalty": 1.3, "top_k": 40}, {"logit_bias": ((3, 1.0),)},
    ]  # fmt: skip
    rows = [replace(BASE, seed=i, output_token_ids=list(range(i % 4)), **kinds[i % 8]) for i in range(32)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(32)]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    assert [together[i] for i in order] == sample(logits[order], [rows[i] for i in order])


def test_what_is_no_number_fails_alone() -> None:
    logits = some_logits(4, 20)
    logits[1, 4] = float("nan")
    logits[2] = float("-inf")
    tokens = sample(logits, [BASE, BASE, replace(BASE, temperature=0.0), BASE])
    assert tokens[1:3] == [INVALID, INVALID]
    assert min(tokens[0], tokens[3]) >= 0


def test_a_tiny_temperature_is_greedy() -> None:
    logits = some_logits(3, 500)
    assert sample(logits, [replace(BASE, temperature=1e-30)] * 3) == logits.argmax(-1).tolist()


def test_log_probabilities() -> None:
    logits = some_logits(3, 100)
    found = token_logprobs(logits, [4, 7, 9], [0, 3, 100])
    expected = logits.log_softmax(-1)
    for row, (item, token, k) in enumerate(zip(found, [4, 7, 9], [0, 3, 100], strict=True)):
        assert item.token_id == token
        assert item.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert item.rank == int((expected[row] > expected[row, token]).sum()) + 1
        assert [i for i, _ in item.top] == expected[row].argsort(descending=True)[:k].tolist()
