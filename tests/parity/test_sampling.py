"""Processing steps against transformers' processors and warpers; the draw against its distribution."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from salver.model.sampling import INVALID, SamplingRow, sample, token_logprobs
from salver.model.sampling.exclusions import allowed_next
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
        {"typical_p": 0.9},
        {"typical_p": 0.2},
        {"typical_p": 0.99},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.8, "top_k": 30, "min_p": 0.01, "typical_p": 0.7},
        {"temperature": 5.0, "top_p": 0.95},
    ],
    ids=str,
)
def test_equal_to_transformers(changes: dict[str, float], vocab: int) -> None:
    row = replace(BASE, **changes)
    logits = some_logits(4, vocab)
    expected = of_transformers(row, logits)
    before = logits.clone()
    found = process(logits, [row] * 4)
    assert torch.equal(logits, before), "the caller's logits are left as they are"
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-4)
    assert torch.equal(found.isfinite(), expected.isfinite())


def of_transformers(row: SamplingRow, logits: torch.Tensor) -> torch.Tensor:
    """What its processors and warpers make of logits [R, V] that all belong to the row."""
    tokens = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]])
    history, expected = tokens.expand(len(logits), -1), logits.clone()
    if row.repetition_penalty != 1:
        expected = RepetitionPenaltyLogitsProcessor(row.repetition_penalty)(history, expected)
    expected = TemperatureLogitsWarper(row.temperature)(history, expected)
    if row.top_k:
        expected = TopKLogitsWarper(row.top_k)(history, expected)
    if row.top_p < 1:
        expected = TopPLogitsWarper(row.top_p)(history, expected)
    if row.min_p:
        expected = MinPLogitsWarper(row.min_p)(history, expected)
    if row.typical_p < 1:
        expected = TypicalLogitsWarper(row.typical_p)(history, expected)
    return expected


def histories(vocab: int, count: int, length: int) -> list[list[int]]:
    draw = random.Random(vocab)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 30, 31, 60])
def test_no_repeat_ngram_is_that_of_transformers(size: int) -> None:
    processor = NoRepeatNGramLogitsProcessor(size)
    for vocab in (3, 6):
        for history in histories(vocab, 20, 30):
            row = replace(BASE, no_repeat_ngram_size=size, temperature=0.0)
            row = replace(row, prompt_token_ids=history[:11], output_token_ids=history[11:])
            logits = some_logits(1, vocab)
            expected = processor(torch.tensor([history]), logits.clone())
            assert torch.equal(process(logits, [row]), expected), history


def test_bad_words_are_those_of_transformers() -> None:
    words = ((4,), (0, 1), (1, 2, 3), (2, 2), (5, 0, 1, 2), tuple(range(6)) * 6)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=99)
    for history in histories(6, 100, 30):
        for length in (1, 2, 30):
            row = replace(BASE, bad_words=words, temperature=0.0)
            row = replace(row, prompt_token_ids=history[:1], output_token_ids=history[1:length])
            logits = some_logits(1, 6)
            expected = processor(torch.tensor([history[:length]]), logits.clone())
            assert torch.equal(process(logits, [row]), expected), history


WORDS = ((1,), (1, 2), (2, 3, 1), (3, 3))


def made_of_words(tokens: tuple[int, ...]) -> bool:
    return not tokens or any(tokens[: len(w)] == w and made_of_words(tokens[len(w) :]) for w in WORDS)


def test_allowed_words_allow_what_can_become_words_and_nothing_else() -> None:
    longest = max(map(len, WORDS))
    wholes = {t for n in range(5 + longest) for t in product((1, 2, 3), repeat=n) if made_of_words(t)}
    for tokens in (t for n in range(5) for t in product((1, 2, 3), repeat=n)):
        following, whole = allowed_next(tokens, WORDS)
        assert whole == (tokens in wholes)
        expected = {w[len(tokens)] for w in wholes if len(w) > len(tokens) and w[: len(tokens)] == tokens}
        assert following == expected, tokens


def test_what_is_allowed_and_where_it_may_stop() -> None:
    logits = some_logits(1, 8)

    def possible(**changes: object) -> set[int]:
        row = replace(BASE, temperature=0.0, stop_token_ids=frozenset([0]), **changes)
        return set(process(logits, [row])[0].isfinite().nonzero().flatten().tolist())

    assert possible(allowed_token_ids=(2, 7)) == {0, 2, 7}
    assert possible(allowed_words=WORDS, output_token_ids=[]) == {0, 1, 2, 3}
    assert possible(allowed_words=WORDS, output_token_ids=[2]) == {3}
    assert possible(allowed_words=WORDS, output_token_ids=[1]) == {0, 1, 2, 3}
    assert possible(allowed_words=WORDS, output_token_ids=[1], banned_token_ids=[0]) == {1, 2, 3}
    assert possible(allowed_words=WORDS, output_token_ids=[], bad_words=((1,), (3,))) == {0, 2}
    assert possible(allowed_words=WORDS, output_token_ids=[7]) == set()


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


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 2.0, "top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.6}],
    ids=str,
)
def test_drawn_as_transformers_would(changes: dict[str, float]) -> None:
    draws, vocab = 6000, 12
    logits = some_logits(1, vocab, seed=3)
    rows = [replace(BASE, seed=seed, output_token_ids=[], **changes) for seed in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows))
    expected = of_transformers(rows[0], logits).softmax(-1)[0].double()
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
        {"typical_p": 0.4}, {"no_repeat_ngram_size": 1}, {"bad_words": ((7,), (1, 8))},
        {"allowed_token_ids": (5, 9)},
    ]  # fmt: skip
    rows = [replace(BASE, seed=i, output_token_ids=list(range(i % 4)), **kinds[i % 12]) for i in range(32)]
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
    found = token_logprobs(logits, [4, 7, 9], [0, 3, 100], [(), (8, 2), (9,)])
    assert [[i for i, _ in item.named] for item in found] == [[], [8, 2], [9]]
    assert found[1].named[1][1] == pytest.approx(float(logits.log_softmax(-1)[1, 2]), abs=1e-6)
    expected = logits.log_softmax(-1)
    for row, (item, token, k) in enumerate(zip(found, [4, 7, 9], [0, 3, 100], strict=True)):
        assert item.token_id == token
        assert item.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert item.rank == int((expected[row] > expected[row, token]).sum()) + 1
        assert [i for i, _ in item.top] == expected[row].argsort(descending=True)[:k].tolist()
