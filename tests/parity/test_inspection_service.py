"""InspectionService over gRPC: the distribution against the sampler and its draws."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from support.checkpoints import write_tiny_llama
from support.encoding_service import EncodingServer
from support.inspection_service import DecoderServer

from salver.client import AsyncClient, InvalidArgument, Message, OutOfRange, Role
from salver.model.chat_template import ChatTemplate
from salver.model.sampling import STEPS, sample
from salver.model.sampling.distribution import GREEDY, MODEL
from salver.model.sampling.sampler import process, weights
from salver.server.engine.grammar import Grammars, load_vocabulary
from salver.server.engine.request import EngineRequest
from salver.server.engine.runner import sampling_rows
from salver.server.engine.sequence import Sequence
from salver.v1 import inspection_pb2

PROMPT = "The teacher gave the book to the student, and then the other one."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def run(server: EncodingServer, test: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with server.running() as client:
            await test(client)

    asyncio.run(asyncio.wait_for(inside(), 60))


def test_every_step_has_its_name_in_the_contract() -> None:
    known = {
        name.removeprefix("SAMPLING_STEP_").lower() for name in dict(inspection_pb2.SamplingStep.items())
    }
    assert known == {"unspecified", MODEL, *(step.name for step in STEPS), GREEDY}


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 3.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "output_token_ids": [5, 9, 9], "temperature": 3.0},
    {"logit_bias": {7: 9.0}, "no_repeat_ngram_size": 2, "min_tokens": 2, "temperature": 1.5, "top_p": 0.7},
    {"allowed_words": ["the", "a"], "bad_words": ["the"], "ignore_eos": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_last_step_is_what_the_sampler_draws_from(llama: Path, options: dict[str, Any]) -> None:
    """Against the sampler's own numbers on the same logits, and every step's masses against one another."""
    server = DecoderServer(llama)
    vocab = server.model.limits.vocab_size
    seen: list[torch.Tensor] = []
    logits_of = server.runner.logits

    def logits(hidden: Any, rows: list[int]) -> Any:
        found = logits_of(hidden, rows)
        if rows:
            seen.append(found.clone())
        return found

    server.runner.logits = logits  # type: ignore[method-assign]
    submitted: list[EngineRequest] = []
    submit = server.engine.submit
    server.engine.submit = lambda request, sink: (submitted.append(request), submit(request, sink))[1]  # type: ignore[method-assign]

    async def test(client: AsyncClient) -> None:
        steps = await client.get_distribution(PROMPT, num_candidates=vocab, **options)
        (raw,) = seen
        (request,) = submitted
        (row,) = sampling_rows(Sequence(request, 0, request.outputs[0], (0, 0.0, 0.0, 0, 0)))
        final = process(raw, [row])
        expected = weights(final).double()
        expected /= expected.sum()
        if options.get("temperature") == 0:
            expected = torch.zeros_like(expected)
            expected[0, sample(raw, [row])[0]] = 1
        found = torch.zeros(vocab, dtype=torch.float64)
        for candidate in steps[-1].candidates:
            found[candidate.token_id] = candidate.probability
        assert torch.equal(found, expected[0])
        assert [step.step for step in steps[1:]] == [
            *(step.name for step in STEPS if step.concerns(row)),
            *([GREEDY] if options.get("temperature") == 0 else []),
        ]
        before: dict[int, float] = {}
        for step in steps:
            after = {c.token_id: c.probability for c in step.candidates}
            assert step.num_tokens == len(after) and sum(after.values()) == pytest.approx(1)
            gone = sum(p for token_id, p in before.items() if token_id not in after)
            assert step.removed_mass == pytest.approx(gone, abs=1e-12)
            before = after
        for c in steps[0].candidates[:20]:
            assert c.token == server.tokenizer.token_bytes(c.token_id)
            assert c.probability == pytest.approx(float(raw[0].double().softmax(-1)[c.token_id]), rel=1e-5)

    run(server, test)


def test_draws_have_the_frequencies_of_the_last_step(llama: Path) -> None:
    server = DecoderServer(llama)
    options: Any = {"temperature": 1.3, "top_k": 12, "min_p": 0.01}

    async def test(client: AsyncClient) -> None:
        steps = await client.get_distribution(PROMPT, num_candidates=20, **options)
        draws: Counter[int] = Counter()
        for seed in range(1, 41):
            result = await client.generate(PROMPT, n=16, max_tokens=1, ignore_eos=True, seed=seed, **options)
            draws.update(completion.token_ids[0] for completion in result.completions)
        last = {c.token_id: c.probability for c in steps[-1].candidates}
        assert set(draws) <= set(last)
        total = sum(draws.values())
        often = [token_id for token_id, p in last.items() if p * total >= 5]
        rest = 1 - sum(last[token_id] for token_id in often)
        observed = [draws[token_id] for token_id in often]
        expected = [last[token_id] * total for token_id in often]
        if rest * total >= 1e-6:
            observed.append(total - sum(observed))
            expected.append(total - sum(expected))
        assert len(often) >= 3
        assert stats.chisquare(observed, expected).pvalue > 1e-3

    run(server, test)


def test_a_grammar_and_a_conversation(llama: Path) -> None:
    """What the grammar takes away, and what it leaves to the draws; the prompt that a template writes."""
    server = DecoderServer(llama)
    server.runner.grammars = Grammars(lambda: load_vocabulary(llama))
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    server.model = replace(server.model, chat_template=template, checkpoint=str(llama))
    ids = functools.partial(server.tokenizer.encode, add_special_tokens=False)
    options: Any = {"num_candidates": server.model.limits.vocab_size, "temperature": 1.0}

    async def test(client: AsyncClient) -> None:
        model, grammar, _ = await client.get_distribution(PROMPT, regex="(other|than) .*", **options)
        assert grammar.step == "grammar"
        kept = {c.token_id: c.token for c in grammar.candidates}
        assert kept and all(b"other ".startswith(t[:6]) or b"than ".startswith(t[:5]) for t in kept.values())
        gone = sum(c.probability for c in model.candidates if c.token_id not in kept)
        assert 0 < grammar.removed_mass == pytest.approx(gone) and grammar.num_tokens == len(kept)
        drawn = await client.generate(PROMPT, regex="(other|than) .*", temperature=1.0, n=8, max_tokens=1)
        assert {c.token_ids[0] for c in drawn.completions} <= set(kept)
        # Output so far moves the grammar on.
        after: Any = {"regex": "(other|than) .*", "output_token_ids": ids("than")}
        later = (await client.get_distribution(PROMPT, **after, **options))[1]
        assert {c.token for c in later.candidates} == {b" "} or all(
            c.token.startswith(b" ") for c in later.candidates
        )
        with pytest.raises(InvalidArgument, match="output_token_ids: do not follow structured_output"):
            await client.get_distribution(PROMPT, regex="other", output_token_ids=ids("than"))
        with pytest.raises(InvalidArgument, match=r"structured_output\.regex"):
            await client.get_distribution(PROMPT, regex="(")
        talk = [Message.user("the book"), Message.assistant("a"), Message.user("in")]
        for wanted, said in (("<the book><a><in>!", None), ("<the book><a><in>", False)):
            found = await client.get_distribution(talk, **options, add_generation_prompt=said)  # type: ignore[arg-type]
            assert found == await client.get_distribution(ids(wanted), **options)
        with pytest.raises(InvalidArgument, match="add_generation_prompt: needs messages"):
            await client.get_distribution("the", add_generation_prompt=True)
        with pytest.raises(InvalidArgument, match=r"messages\[0\]\.tool_call_id: is a tool's"):
            await client.get_distribution([Message(Role.USER, "x", tool_call_id="1")])

    run(server, test)


def test_what_is_refused(llama: Path, tmp_path: Path) -> None:
    server = DecoderServer(llama)

    async def test(client: AsyncClient) -> None:
        nothing = await client.get_distribution(
            "the", allowed_token_ids=[5], bad_token_sequences=[[5]], ignore_eos=True
        )
        assert nothing[-1].num_tokens == 0 and nothing[-1].candidates == ()
        for match, options in (
            ("num_candidates", {"num_candidates": 0}),
            ("sampling.top_p", {"top_p": 2.0}),
            (r"output_token_ids\[1\]", {"output_token_ids": [3, 100_000]}),
        ):
            with pytest.raises(InvalidArgument, match=match):
                await client.get_distribution("the", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=r"sampling\.seed: does nothing"):
            await client.get_distribution("the", seed=1)  # type: ignore[call-arg]
        with pytest.raises(InvalidArgument, match="prompt"):
            await client.get_distribution("")
        with pytest.raises(OutOfRange, match="600 tokens"):
            await client.get_distribution([5] * 600)

    run(server, test)
