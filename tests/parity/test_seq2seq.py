"""Every encoder-decoder family against transformers, in every variant, however the work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exactness
from support.seq2seq import VARIANTS, VOCAB, logits_of, write
from support.stack import CPU, Stack, random_prompts

from salver.model import loader
from salver.model.cache import KVCache
from salver.model.errors import CheckpointError
from salver.model.families import FAMILIES
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import BLOCK_SIZE, INT4_BLOCK, Library, Precision
from salver.model.kernels.seq2seq import NativeSeq2Seq
from salver.model.loader import load_model
from salver.model.spec import BucketPositions, ModelSpec, SinusoidalPositions
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import (
    BeamParams,
    EngineRequest,
    FinishReason,
    SamplingParams,
    StoppingParams,
)

TOLERANCE = 1e-3

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(lengths: list[int], vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Ids from 4 on: nobody's padding."""
    return [[4 + i for i in ids] for ids in random_prompts(vocab_size - 4, lengths, seed)]


def ours(stack: Stack, source: list[int], output: list[int], chunk: int | None = None) -> torch.Tensor:
    stack.read({-1: source})
    found = stack.logits(output, chunk)
    stack.free += stack.sources.pop(-1)[0]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write(tmp_path, VARIANTS[name])
    stack = Stack(tmp_path)
    vocab_size = stack.model.spec.vocab_size
    for length, count in ((3, 30), (41, 9), (17, 1)):
        (source,), (output,) = texts([length]), texts([count], vocab_size, seed=1)
        expected = logits_of(reference, source, output)
        assert expected.std() > 0.2, "logits this flat would show nothing"
        for chunk in (None, 4, 1):
            assert float((ours(stack, source, output, chunk) - expected).abs().max()) < TOLERANCE
    tokens_are_the_same(reference, stack)
    (source,), (output,) = texts([41]), texts([30], vocab_size, seed=1)
    every_knob_shows(stack, tmp_path, source, output, logits_of(reference, source, output), monkeypatch)


def tokens_are_the_same(reference: Any, stack: Stack) -> None:
    """transformers' greedy tokens; and ours alone and together with strangers, read in one step or apart."""
    start = list(stack.model.spec.output_start)
    sources = texts([20, 5, 33, 20])
    ids = torch.tensor(sources[:1])
    whole = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=1,
        eos_token_id=None, use_cache=False,  # whose T5 counts the encoder's layers for the decoder's
    )  # fmt: skip
    alone = []
    for source in sources:
        stack.read({-1: source})
        alone.append(stack.greedy(start, 8))
        stack.free += stack.sources.pop(-1)[0]
    assert alone[0] == whole[0, len(start) :].tolist()
    stack.read(dict(enumerate(sources[:3])))
    stack.read({3: sources[3]})
    assert stack.greedy_together([start] * 4, 8, chunk=16) == alone
    for sequence in range(4):
        stack.free += stack.sources.pop(sequence)[0]


def every_knob_shows(
    stack: Stack,
    checkpoint: Path,
    source: list[int],
    output: list[int],
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A spec that is wrong in one field gives other logits, or does not fit the checkpoint."""
    seen = 0
    for what, broken in broken_specs(stack.model.spec):
        monkeypatch.setattr(loader, "read_spec", lambda _, broken=broken: broken)
        try:
            found = ours(Stack(checkpoint, num_blocks=40), source, output)
        except (CheckpointError, ValueError, RuntimeError, AssertionError):
            continue
        seen += 1
        assert float((found - expected).abs().max()) > 5 * TOLERANCE, what
    assert seen >= 4


def broken_specs(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """The spec, its encoder too, wrong in one field each, and what is wrong."""
    for what, broken in broken_fields(spec):
        yield what, broken
    for what, broken in broken_fields(spec.encoder):
        yield f"encoder.{what}", replace(spec, encoder=broken)


def broken_fields(spec: Any) -> Iterator[tuple[str, Any]]:
    passed_over = ("encoder", "num_layers", "weights", "pad_token_id", "mask_token_id")
    for described in fields(spec):
        value, usual = getattr(spec, described.name), described.default
        if described.name in passed_over or "token_id" in described.name:
            continue
        if usual is not MISSING and value != usual:
            yield described.name, replace(spec, **{described.name: usual})
        if isinstance(value, float) and value != usual:
            yield f"{described.name} doubled", replace(spec, **{described.name: 2 * value})
    yield "norm.eps", replace(spec, norm=replace(spec.norm, eps=spec.norm.eps + 0.1))
    yield "activation", replace(spec, activation="silu" if spec.activation == "relu" else "relu")
    yield "attention_multiplier", replace(spec, attention_multiplier=1.3 * spec.attention_scale)
    places = [name for name in ("positions", "sinusoids", "buckets") if getattr(spec, name, None) is not None]
    for name in places:
        value = getattr(spec, name)
        if isinstance(value, SinusoidalPositions):
            yield f"{name}.open_end", replace(spec, **{name: replace(value, open_end=not value.open_end)})
        if isinstance(value, BucketPositions) or name == "buckets":
            farther = replace(value, max_distance=value.max_distance + 9)
            yield f"{name}.max_distance", replace(spec, **{name: farther})


# Of every way of positions and norms one; M2M-100 pads its rows otherwise.
MIXED = ("Marian paper", "T5 flan", "MBart scaled", "M2M100 plain")


def test_the_same_tokens_in_any_mix(tmp_path: Path) -> None:
    """Through the engine: chunks, preemptions, samples, cached sources, resumed and cancelled requests."""
    runners = []
    for name in MIXED:
        write(tmp_path / name, VARIANTS[name])
        runners.append(exactness.runner_of(tmp_path / name, "float32", None))
    ways = exactness.Ways()
    for seed in range(32):
        found = list(exactness.run_mix(runners[seed % len(MIXED)], seed, ways, bits=False))
        assert not found, f"mix {seed}, {MIXED[seed % len(MIXED)]}"
    for way in ("chunks", "cached", "preempted", "resumed", "samples", "sampled", "beams"):
        assert ways.counts[way] >= 3, str(ways)


@pytest.mark.parametrize("bos", [None, 7])
def test_beams_with_forced_tokens(bos: int | None, tmp_path: Path) -> None:
    """transformers' beams and scores, four beams over one source."""
    reference = write(tmp_path, VARIANTS["Marian paper"])
    runner = exactness.runner_of(tmp_path, "float32", None)
    (source,), ends = texts([20]), [2, 11, 23, 31, 47, 53]
    ids = torch.tensor([source])
    start = (3,) if bos is None else (3, bos)
    found_ends = set()
    for penalty, early in ((1.0, False), (2.0, "never"), (0.5, True), (-1.0, False)):
        made = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8 + len(start), num_beams=4,
            num_return_sequences=4, eos_token_id=ends, forced_eos_token_id=2, forced_bos_token_id=bos,
            length_penalty=penalty, early_stopping=early, output_scores=True, return_dict_in_generate=True,
            do_sample=False,
        )  # fmt: skip
        request = EngineRequest(
            1, start, SamplingParams(temperature=0.0),
            StoppingParams(9, stop_token_ids=frozenset(ends), forced_eos_token_id=2),
            sample_indices=(0, 1, 2, 3), outputs=((),) * 4, beams=BeamParams(4, penalty, early),
            source_token_ids=tuple(source), num_start_tokens=len(start),
        )  # fmt: skip
        limits = replace(exactness.ROOMY, max_source_len=len(source))
        engine = InlineEngine(runner, limits, clock=itertools.count().__next__)
        best = exactness.Answer()
        engine.submit(request, best)
        engine.run()
        assert engine.core.pool.num_used == 0
        found_ends |= set(best.finished.values())
        for index, (row, score) in enumerate(
            zip(made.sequences[:, len(start) :].tolist(), made.sequences_scores.tolist(), strict=True)
        ):
            end = next(place for place, token in enumerate(row) if token in ends)
            assert best.tokens[index] == row[: end + 1]
            assert best.scores[index] == pytest.approx(score, abs=1e-4)
    assert FinishReason.LENGTH in found_ends


# What the native kernel takes: heads of 16 values.
NATIVE = {
    "Marian paper": {"d_model": 64, "decoder_attention_heads": 4},
    "Bart scaled": {"d_model": 64, "decoder_attention_heads": 4, "encoder_layers": 3},
    "Marian own": {"d_model": 64, "decoder_attention_heads": 4},
    "T5 plain": {"d_kv": 16},
    "UMT5 plain": {"d_kv": 16, "d_ff": 64},  # torch's GELU rounds what is behind the last 32 values otherwise
}


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_kernel(name: str, tmp_path: Path, library: Library) -> None:
    """The same logits, in float32 and about so in bfloat16; the same bits in any mix."""
    variant = VARIANTS[name]
    reference = write(tmp_path, replace(variant, config={**variant.config, **NATIVE[name]}))
    vocab_size = reference.config.decoder_vocab_size if "own" in name else VOCAB
    for precision, tolerance in ((Precision.FLOAT32, TOLERANCE), (Precision.BFLOAT16, 0.15)):
        dtype = torch.float32 if precision is Precision.FLOAT32 else torch.bfloat16
        model = load_model(tmp_path, device=CPU, dtype=dtype)
        cache = KVCache(model.spec, 200, BLOCK_SIZE, dtype=dtype, device=CPU)
        stack = Stack.of(NativeSeq2Seq(model, cache, library, precision=precision, threads=1), cache)
        for length, count in ((3, 40), (41, 9)):
            (source,), (output,) = texts([length]), texts([count], vocab_size, seed=1)
            expected = logits_of(reference, source, output)
            for chunk in (None, 4, 1):
                error = (ours(stack, source, output, chunk) - expected).abs()
                assert float(error.max() if dtype == torch.float32 else error.mean()) < tolerance
    ways = exactness.Ways()
    sizes = (model.spec.hidden_size, model.spec.intermediate_size, model.spec.qkv_sizes[0])
    in_blocks = all(size % INT4_BLOCK == 0 for size in sizes)
    for mode in (mode for mode in exactness.NATIVE_MODES if in_blocks or mode != "int4"):
        runner = exactness.runner_of(tmp_path, mode, library)
        for seed in range(3):
            assert not list(exactness.run_mix(runner, seed, ways, bits=True)), f"mix {seed}, {mode}"


def test_every_family_is_here() -> None:
    from support.decoders import VARIANTS as DECODERS

    tried = {variant.model for variant in VARIANTS.values()}
    known = tried | {variant.model for variant in DECODERS.values()}
    assert FAMILIES.keys() == known | {
        "MPTForCausalLM", "GPT2LMHeadModel", "BartModel", "T5WithLMHeadModel",
    }  # fmt: skip
