"""Beam search through the real engine: transformers' beams and scores, and the same bits in any company."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import decoders, exactness
from support.exactness import Answer
from support.parity import oracle
from support.stack import random_prompts

from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library
from salver.model.sampling import SamplingRow, candidates
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    SamplingParams,
    StoppingParams,
)
from salver.server.engine.runner import ModelRunner

FAMILIES = ("Llama plain", "GPTNeo plain", "Falcon grouped", "Bloom six", "Phi3 longrope", "Qwen2Moe mixed")
TOKENS = 14
ENDS = frozenset({3, 11, 23, 31, 47, 53, 61, 71, 83, 89})  # of 97: searches end in many ways
SEARCHES = tuple(
    BeamParams(num_beams, length_penalty, early_stopping)
    for num_beams, length_penalty, early_stopping in (
        (2, 1.0, False),
        (4, 0.0, "never"),
        (5, -1.0, True),
        (4, 2.0, "never"),
        (2, 0.0, False),
        (5, 1.0, "never"),
        (4, 1.0, True),
        (5, 2.0, False),
        (4, -1.0, "never"),
    )
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Answers(Answer):
    """The same sink, of a beam search."""

    def best(self) -> list[tuple[list[int], float | None]]:
        return [(self.tokens[index], self.scores[index]) for index in sorted(self.finished)]


def asked(number: int, prompt: Sequence[int], beams: BeamParams, n: int = 0, **changes: Any) -> EngineRequest:
    n = n or beams.num_beams
    stopping = changes.pop("stopping", StoppingParams(TOKENS, stop_token_ids=ENDS))
    changes.setdefault("sampling", SamplingParams(temperature=0.0))
    return EngineRequest(
        number, tuple(prompt), stopping=stopping, sample_indices=tuple(range(n)), outputs=((),) * n,
        beams=beams, **changes,
    )  # fmt: skip


def answers_of(runner: ModelRunner, requests: Sequence[EngineRequest], **limits: Any) -> list[Answers]:
    bounds = replace(exactness.ROOMY, rope_context=runner.model.spec.rope_context, **limits)
    engine = InlineEngine(runner, bounds, clock=itertools.count().__next__)
    found = [Answers() for _ in requests]
    for request, sink in zip(requests, found, strict=True):
        engine.submit(request, sink)
    engine.run()
    assert engine.core.pool.num_used == 0
    return found


@torch.inference_mode()
def of_transformers(reference: Any, prompt: Sequence[int], beams: BeamParams, **more: Any) -> list[Any]:
    """[(tokens, score)], best first."""
    ids = torch.tensor([list(prompt)])
    ends = sorted(more.pop("ends", ENDS)) or None
    made = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
        num_beams=beams.num_beams, num_return_sequences=beams.num_beams, eos_token_id=ends, pad_token_id=0,
        length_penalty=beams.length_penalty, early_stopping=beams.early_stopping, output_scores=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    found = []
    for row, score in zip(
        made.sequences[:, len(prompt) :].tolist(), made.sequences_scores.tolist(), strict=True
    ):
        end = next((at + 1 for at, token in enumerate(row) if token in (ends or ())), len(row))
        found.append((row[:end], score))
    return found


def same(found: list[tuple[list[int], float | None]], expected: list[Any]) -> bool:
    return [tokens for tokens, _ in found] == [tokens for tokens, _ in expected] and all(
        ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)
        for (_, ours), (_, theirs) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_beams_and_scores(name: str, tmp_path: Path) -> None:
    reference = decoders.write(tmp_path, decoders.VARIANTS[name])
    runner = exactness.runner_of(tmp_path, "float32", None)
    prompts = random_prompts(decoders.VOCAB, [9 + 2 * number for number in range(len(SEARCHES))], seed=3)
    (favourite,) = answers_of(runner, [asked(0, prompts[0], SEARCHES[0], stopping=StoppingParams(TOKENS))])
    requests, alone, reasons = [], [], set()
    for number, (prompt, beams) in enumerate(zip(prompts, SEARCHES, strict=True)):
        # Some end soon, whatever the family likes to say.
        ends = ENDS | {favourite.tokens[0][4]} if number % 2 else ENDS
        requests.append(asked(number, prompt, beams, stopping=StoppingParams(TOKENS, stop_token_ids=ends)))
        (answers,) = answers_of(runner, requests[-1:])
        expected = of_transformers(reference, prompt, beams, ends=ends)
        assert same(answers.best(), expected), f"{beams}: {answers.best()} is not {expected}"
        reasons |= set(answers.finished.values())
        alone.append(answers.best())
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    # All together, in chunks.
    together = answers_of(
        runner, requests, num_blocks=60, max_num_seqs=9, max_num_batched_tokens=11, enable_prefix_caching=True
    )
    assert [answers.best() for answers in together] == alone


PROCESSORS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "no ends": lambda found: {"ends": ()},
    "min_new_tokens": lambda found: {"ends": {found[2], found[5]}, "min_new_tokens": 6},
    "repetition_penalty": lambda found: {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": lambda found: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda found: {"bad_words_ids": [[found[3]], found[0:2], [8]]},
    "several": lambda found: {
        "ends": {found[2]}, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_change_scores_as_in_transformers(name: str, tiny_gpt2: Path) -> None:
    reference, runner = oracle(tiny_gpt2), exactness.runner_of(tiny_gpt2, "float32", None)
    (prompt,) = random_prompts(97, [12], seed=5)
    beams = BeamParams(4, early_stopping="never")
    (plain,) = answers_of(runner, [asked(0, prompt, beams)])
    more = PROCESSORS[name](plain.tokens[0])  # of tokens that would be chosen
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=more.get("repetition_penalty", 1.0),
        no_repeat_ngram_size=more.get("no_repeat_ngram_size", 0),
        bad_words=tuple(map(tuple, more.get("bad_words_ids", ()))),
    )
    stopping = StoppingParams(TOKENS, more.get("min_new_tokens", 0), frozenset(more.get("ends", ENDS)))
    (answers,) = answers_of(runner, [asked(1, prompt, beams, sampling=sampling, stopping=stopping)])
    expected = of_transformers(reference, prompt, beams, **more)
    assert same(answers.best(), expected), f"{answers.best()} is not {expected}"
    assert name == "no ends" or answers.best() != plain.best(), "the processor shows nothing here"


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


# It holds one search, and not what comes before it at its full length: searches are preempted.
NARROW: dict[str, Any] = {
    "num_blocks": 14, "max_num_seqs": 8, "max_num_batched_tokens": 12, "enable_prefix_caching": True,
}  # fmt: skip


def crowd(seed: int) -> list[EngineRequest]:
    """Two requests that sample, and two searches behind them; all begin alike."""
    draw = random.Random(f"beams/{seed}")
    stem = [draw.randrange(97) for _ in range(16)]
    stopping = StoppingParams(30)
    requests = []
    for number in range(4):
        prompt = stem + [draw.randrange(97) for _ in range(draw.randint(1, 20))]
        if number < 2:
            sampling = SamplingParams(temperature=1.0, seed=seed)
            outputs: tuple[tuple[int, ...], ...] = ((), ())
            requests.append(
                EngineRequest(number, tuple(prompt), sampling, stopping, (0, 1), outputs, output_top_k=0)
            )
        else:
            early_stopping: bool | str = draw.choice((True, False, "never"))
            beams = BeamParams(3, draw.choice((0.0, 1.0)), early_stopping)
            requests.append(
                asked(number, prompt, beams, 2, stopping=stopping, output_top_k=1, prompt_top_k=0)
            )
    return requests


@pytest.mark.parametrize("mode", ["float32", "int8"])
def test_the_same_bits_in_a_crowd(mode: str, library: Library, tiny_llama: Path) -> None:
    runner = exactness.runner_of(tiny_llama, mode, library)
    preempted = 0
    for seed in range(2):
        requests = crowd(seed)
        alone = [answers_of(runner, [request])[0] for request in requests]
        together = answers_of(runner, requests, **NARROW)
        for request, one, other in zip(requests, alone, together, strict=True):
            assert (one.best(), one.logprobs, one.prompt) == (other.best(), other.logprobs, other.prompt)
            preempted += request.beams is not None and other.preemptions > 0
    assert preempted


def test_log_probabilities_are_those_of_the_raw_logits(tiny_gpt2: Path) -> None:
    runner = exactness.runner_of(tiny_gpt2, "float32", None)
    (prompt,) = random_prompts(97, [12], seed=9)
    beams = BeamParams(3, length_penalty=0.0)
    (answers,) = answers_of(runner, [asked(1, prompt, beams, output_top_k=2, logprob_token_ids=(5,))])
    for tokens, score in answers.best():
        index = [kept for kept, _ in answers.best()].index(tokens)
        told = answers.logprobs[index]
        assert [entry.token_id for entry in told] == tokens
        assert all(len(entry.top) == 2 and entry.named[0][0] == 5 for entry in told)
        assert sum(entry.logprob for entry in told) == pytest.approx(score, abs=1e-5)


def row(**changes: Any) -> SamplingRow:
    greedy = SamplingRow(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, (), 0, 0, (), ())
    return replace(greedy, **changes)


def test_candidates_know_no_company_and_take_the_lower_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.5], [3.0, 1.0, 2.0, 0.0, -1.0], [1.0] * 5])
    found = candidates(logits, [row(), row(banned_token_ids=(0, 2)), row()], [2, 4, 3])
    assert [[token for token, _ in pairs] for pairs in found] == [[1, 2], [1, 3, 4], [0, 1, 2]]
    for index, (count, changes) in enumerate(((2, {}), (4, {"banned_token_ids": (0, 2)}), (3, {}))):
        assert candidates(logits[index : index + 1], [row(**changes)], [count]) == [found[index]]
    assert candidates(logits[1:2], [row(banned_token_ids=range(5))], [4]) == [[]]
