"""Random mixes of requests through the real engine, each compared with the same request alone.

`python -m support.exactness --mixes 10000` (`make exactness`) runs many, in every precision; the
tests run some. A mix is a function of its number, so `--first N --mixes 1` replays one that failed.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from salver.model.cache import KVCache
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library, Precision
from salver.model.kernels.program import NativeTransformer
from salver.model.kernels.seq2seq import NativeSeq2Seq
from salver.model.loader import load_model
from salver.model.numerics import row_multiple
from salver.server.engine.core import EngineLimits
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    Logprobs,
    SamplingParams,
    SequenceOutput,
    StoppingParams,
)
from salver.server.engine.runner import ModelRunner
from salver.server.engine.source_reader import SourceReader

CPU = torch.device("cpu")
BLOCKS, BLOCK_SIZE, CONTEXT = 120, 16, 256
NATIVE_MODES = ("float32", "bfloat16", "int8", "int4")


def runner_of(checkpoint: Path, mode: str, library: Library | None, threads: int = 2) -> ModelRunner:
    """A runner in a precision mode: with the native kernel, or (float32 alone) in plain torch."""
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    model = load_model(checkpoint, device=CPU, dtype=dtype, numerics="exact")
    cache = KVCache(model.spec, BLOCKS, BLOCK_SIZE, dtype=dtype, device=CPU)
    if library is None:
        assert mode == "float32"
        multiple = row_multiple(model)
        model.pad_experts(multiple)
        sources = SourceReader(model, cache, row_multiple=multiple) if model.encoder is not None else None
        return ModelRunner(model, cache, block_size=BLOCK_SIZE, row_multiple=multiple, sources=sources)
    kind = NativeTransformer if model.encoder is None else NativeSeq2Seq
    native = kind(model, cache, library, precision=Precision[mode.upper()], threads=threads)
    sources = SourceReader(native, cache, row_multiple=1) if isinstance(native, NativeSeq2Seq) else None
    return ModelRunner(native, cache, block_size=BLOCK_SIZE, row_multiple=1, sources=sources)


@dataclass
class Answer:
    """A sink, and what it took: by sample, and of the prompt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    prompt: list[Logprobs] = field(default_factory=list)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    scores: dict[int, float | None] = field(default_factory=dict)  # of a beam search
    cached: int = 0
    preemptions: int = 0

    def put(self, output: SequenceOutput) -> None:
        index = output.sample_index
        assert not output.error, output.error
        self.tokens.setdefault(index, []).extend(output.token_ids)
        self.logprobs.setdefault(index, []).extend(output.logprobs or [])
        self.prompt += output.prompt_logprobs or []
        self.cached = max(self.cached, output.num_cached_tokens)
        if output.finish_reason is not None:
            self.finished[index] = output.finish_reason
            self.scores[index] = output.score
            assert output.timings is not None
            self.preemptions += output.timings.preemptions

    def started(self, seconds: float) -> None:
        pass


@dataclass(frozen=True)
class Difference:
    """What of a request came out otherwise in a mix than alone."""

    request: int
    what: str
    alone: object
    mixed: object


ROOMY = EngineLimits(
    num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_model_len=CONTEXT, max_num_seqs=16,
    max_num_batched_tokens=4096, enable_prefix_caching=False, check_integrity=True,
)  # fmt: skip


class Mix:
    """Some requests and the narrow engine that they meet in; a function of the seed."""

    def __init__(self, seed: int, vocab_size: int, source_vocab_size: int = 0) -> None:
        """With `source_vocab_size` every request has a source, some the same."""
        self._draw = random.Random(f"mix/{seed}")
        self._vocab_size = vocab_size
        draw = self._draw
        stem = self._tokens(draw.choice((0, 16, 33, 64)))  # what prompts may begin with
        self.requests = [self._request(number, stem) for number in range(draw.randint(2, 6))]
        if source_vocab_size:
            lengths = (1, 5, 16, 17, 40, 60)
            texts = [
                tuple(4 + draw.randrange(source_vocab_size - 4) for _ in range(draw.choice(lengths)))
                for _ in range(3)
            ]
            self.requests = [replace(r, source_token_ids=draw.choice(texts)) for r in self.requests]
        self._beams = random.Random(f"beams/{seed}")
        self.victims = {r.request_id for r in self.requests if draw.random() < 0.1}  # cancelled on the way
        seats = draw.choice((2, 3, 6, 12))
        self.requests = [self._searching(request, seats) for request in self.requests]
        source = max(len(r.source_token_ids) for r in self.requests)
        # The null block, and those of the request that needs most.
        least = max(map(_num_blocks, self.requests)) + -(-source // BLOCK_SIZE) + 1
        self.limits = replace(
            ROOMY,
            num_blocks=least + draw.choice((0, 1, 2, 3, 60)),
            max_num_seqs=seats,
            max_num_batched_tokens=seats + draw.choice((0, 5, 13, 40, 300)),
            tokens_for_one=draw.choice((0, 3, 20)),
            enable_prefix_caching=draw.random() < 0.7,
            max_source_len=source,
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(self._vocab_size) for _ in range(count))

    def _request(self, number: int, stem: tuple[int, ...]) -> EngineRequest:
        draw = self._draw
        n = draw.choice((1, 1, 1, 2, 3))
        sampling = SamplingParams(
            temperature=draw.choice((0.0, 0.0, 0.7, 1.0, 1.4)),
            top_k=draw.choice((0, 0, 20)),
            top_p=draw.choice((1.0, 0.9)),
            min_p=draw.choice((0.0, 0.0, 0.03)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
            frequency_penalty=draw.choice((0.0, 0.0, 0.5)),
            logit_bias=draw.choice(((), ((7, 3.0), (9, -4.0)))),
            seed=draw.getrandbits(60),
        )
        begins = stem if draw.random() < 0.6 else ()
        return EngineRequest(
            request_id=number,
            prompt_token_ids=begins + self._tokens(draw.choice((1, 2, 15, 16, 17, 30, 50))),
            sampling=sampling,
            stopping=StoppingParams(draw.choice((0, 1, 4, 9, 36)) if n == 1 else draw.randint(1, 24)),
            sample_indices=tuple(range(n)),
            outputs=((),) * n,
            output_top_k=draw.choice((None, 0, 3)),
            prompt_top_k=draw.choice((None, None, 0, 2)),
            priority=draw.choice((0, 0, 0, 1)),
        )

    def _searching(self, request: EngineRequest, seats: int) -> EngineRequest:
        """The request, or a beam search in its place."""
        draw = self._beams
        if draw.random() < 0.8:
            return request
        num_beams = draw.randint(2, min(5, seats))
        n = draw.randint(1, num_beams)
        stops = frozenset(draw.randrange(self._vocab_size) for _ in range(draw.choice((0, 3, 20))))
        penalty, early = draw.choice((-0.5, 0.0, 1.0, 2.0)), draw.choice((False, True, "never"))
        return replace(
            request,
            beams=BeamParams(num_beams, penalty, early),
            sampling=replace(request.sampling, temperature=draw.choice((0.0, 0.0, 0.7))),
            stopping=StoppingParams(draw.choice((1, 4, 9, 20)), stop_token_ids=stops),
            sample_indices=tuple(range(n)),
            outputs=((),) * n,
        )

    def resumed(self, request: EngineRequest, alone: Answer) -> EngineRequest:
        """The request as one that another server had begun: with some tokens of its answer."""
        draw = self._draw
        if request.stopping.max_tokens < 2 or draw.random() < 0.7 or request.beams is not None:
            return request
        outputs = tuple(
            tuple(alone.tokens[index][: draw.randrange(len(alone.tokens[index]))])
            for index in request.sample_indices
        )
        return replace(request, outputs=outputs)


def _num_blocks(request: EngineRequest) -> int:
    """Of its output and of what that begins with; the beams of a search share the prompt's full blocks."""
    prompt, most = len(request.prompt_token_ids), request.stopping.max_tokens
    shared = 0 if request.beams is None else (prompt - 1) // BLOCK_SIZE
    places = 1 if request.beams is None else request.num_places
    return shared + places * (-(-(prompt + most) // BLOCK_SIZE) - shared)


class Ways:
    """What the mixes went through, to know that they went through everything."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))


def run_mix(runner: ModelRunner, seed: int, ways: Ways, *, bits: bool) -> Iterator[Difference]:
    """Every request alone, then all together; what differs. With `bits` the log-probabilities too."""
    encoder = runner.model.spec.encoder
    mix = Mix(seed, runner.model.spec.vocab_size, 0 if encoder is None else encoder.vocab_size)
    alone = [_alone(runner, request) for request in mix.requests]
    asked = [mix.resumed(r, a) for r, a in zip(mix.requests, alone, strict=True)]
    answers = _together(runner, mix, asked, ways)
    ways.counts["mixes"] += 1
    for request, truth, answer in zip(asked, alone, answers, strict=True):
        whole = request.request_id not in mix.victims
        ways.counts["requests"] += whole
        ways.counts["resumed"] += any(map(len, request.outputs))
        ways.counts["cached"] += answer.cached > 0
        ways.counts["preempted"] += answer.preemptions > 0
        ways.counts["samples"] += len(request.sample_indices) > 1
        ways.counts["sampled"] += request.sampling.temperature > 0
        if request.beams is not None:
            ways.counts["beams"] += whole
            ways.counts["preempted beams"] += answer.preemptions > 0
        yield from _differences(request, truth, answer, whole=whole, bits=bits)


def _alone(runner: ModelRunner, request: EngineRequest) -> Answer:
    source = len(request.source_token_ids)
    limits = replace(ROOMY, rope_context=runner.model.spec.rope_context, max_source_len=source)
    engine = InlineEngine(runner, limits, clock=itertools.count().__next__)
    answer = Answer()
    engine.submit(request, answer)
    engine.run()
    return answer


def _together(runner: ModelRunner, mix: Mix, asked: list[EngineRequest], ways: Ways) -> list[Answer]:
    """They come at any step and in any order; some are cancelled."""
    limits = replace(mix.limits, rope_context=runner.model.spec.rope_context)
    engine = InlineEngine(runner, limits, clock=itertools.count().__next__)
    draw = random.Random(f"arrivals/{len(asked)}/{mix.requests[0].sampling.seed}")
    answers = [Answer() for _ in asked]
    coming = sorted((draw.randrange(12), number) for number in draw.sample(range(len(asked)), len(asked)))
    cancelled = {number: draw.randrange(2, 20) for number in sorted(mix.victims)}
    for step in itertools.count():
        while coming and coming[0][0] <= step:
            number = coming.pop(0)[1]
            engine.submit(replace(asked[number], arrival=float(step)), answers[number])
        for number in [n for n, when in cancelled.items() if when == step]:
            engine.abort(number)
        if not (coming or engine.has_work):
            break
        before = {s.request.request_id: s.num_computed_tokens for s in engine.core.scheduler.running}
        engine.step()
        for sequence in engine.core.scheduler.running:
            began = before.get(sequence.request.request_id, 0)
            ways.counts["chunks"] += began < sequence.num_computed_tokens < sequence.num_prompt_tokens
        ways.counts["steps"] += 1
    return answers


def _differences(
    request: EngineRequest, truth: Answer, answer: Answer, *, whole: bool, bits: bool
) -> Iterator[Difference]:
    """Of a request that was cancelled, what had come is the beginning of what comes alone."""
    number = request.request_id
    for index, output in zip(request.sample_indices, request.outputs, strict=True):
        expected = truth.tokens.get(index, [])[len(output) :]
        tokens = answer.tokens.get(index, [])
        if not whole:
            expected = expected[: len(tokens)]
        if tokens != expected:
            yield Difference(number, f"tokens of sample {index}", expected, tokens)
        logprobs, told = truth.logprobs.get(index, [])[len(output) :], answer.logprobs.get(index, [])
        if bits and told != logprobs[: len(told) if not whole else None]:
            yield Difference(number, f"log-probabilities of sample {index}", logprobs, told)
        if bits and whole and answer.scores.get(index) != truth.scores[index]:
            yield Difference(
                number, f"score of answer {index}", truth.scores[index], answer.scores.get(index)
            )
        if whole and answer.finished.get(index) is not truth.finished[index]:
            yield Difference(
                number, f"end of sample {index}", truth.finished[index], answer.finished.get(index)
            )
    prompt, told = truth.prompt, answer.prompt
    if not whole:
        prompt = prompt[: len(told)]
    if bits and told != prompt:
        yield Difference(number, "log-probabilities of the prompt", prompt, told)
    if len(told) != len(prompt):
        yield Difference(number, "positions of the prompt", len(prompt), len(told))


def find_library(cache_dir: Path) -> Library | None:
    """The native kernel, or None where it cannot be had."""
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        print(f"no native kernel here ({error}): tokens in float32", file=sys.stderr)
        return None


def main() -> int:
    from support.checkpoints import write_tiny_gpt2, write_tiny_llama
    from support.seq2seq import write_tiny_marian

    from salver.server.catalog import default_cache_dir

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixes", type=int, default=10_000, help="over all precisions and models")
    parser.add_argument("--first", type=int, default=0, help="number of the first mix")
    parser.add_argument(
        "--threads", type=int, default=2, help="of the kernel; 1 where several of these share the machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = find_library(default_cache_dir())
    modes = NATIVE_MODES if library is not None else ("float32",)
    ways, failed, told = Ways(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = [
            write(Path(directory) / write.__name__)
            for write in (write_tiny_llama, write_tiny_gpt2, write_tiny_marian)
        ]
        runners = [
            (f"{path.name.removeprefix('write_')} {mode}", runner_of(path, mode, library, args.threads))
            for path in checkpoints
            for mode in modes
        ]
        for seed in range(args.first, args.first + args.mixes):
            name, runner = runners[seed % len(runners)]
            differences = list(run_mix(runner, seed, ways, bits=library is not None))
            failed += bool(differences)
            for found in differences:
                print(f"mix {seed} ({name}), request {found.request}: {found.what}: "
                      f"alone {found.alone}, mixed {found.mixed}")  # fmt: skip
            if time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{ways.counts['mixes']} of {args.mixes} mixes, {failed} failed", flush=True)
    promise = "tokens and bits" if library is not None else "tokens"
    print(f"{failed} of {args.mixes} mixes differ ({promise}; {', '.join(n for n, _ in runners)}): {ways}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
