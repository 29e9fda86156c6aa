"""Every encoder-decoder family against transformers, in every variant, however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exactness
from support.seq2seq import VARIANTS, VOCAB, write
from support.stack import Stack, random_prompts

from salver.model import loader
from salver.model.errors import CheckpointError
from salver.model.families import FAMILIES
from salver.model.spec import BucketPositions, ModelSpec, SinusoidalPositions

TOLERANCE = 1e-3

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(lengths: list[int], vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Ids from 4 on: nobody's padding."""
    return [[4 + i for i in ids] for ids in random_prompts(vocab_size - 4, lengths, seed)]


@torch.inference_mode()
def logits(reference: Any, source: list[int], output: list[int]) -> torch.Tensor:
    """[n, vocab]"""
    ids = torch.tensor([source])
    found: torch.Tensor = reference(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([output])
    ).logits[0]
    return found


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
        expected = logits(reference, source, output)
        assert expected.std() > 0.2, "logits this flat would show nothing"
        for chunk in (None, 4, 1):
            assert float((ours(stack, source, output, chunk) - expected).abs().max()) < TOLERANCE
    tokens_are_the_same(reference, stack)
    (source,), (output,) = texts([41]), texts([30], vocab_size, seed=1)
    every_knob_shows(stack, tmp_path, source, output, logits(reference, source, output), monkeypatch)


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
    for way in ("chunks", "cached", "preempted", "resumed", "samples", "sampled"):
        assert ways.counts[way] >= 3, str(ways)


def test_every_family_is_here() -> None:
    from support.decoders import VARIANTS as DECODERS

    tried = {variant.model for variant in VARIANTS.values()}
    known = tried | {variant.model for variant in DECODERS.values()}
    assert FAMILIES.keys() == known | {"MPTForCausalLM", "GPT2LMHeadModel", "BartModel"}
