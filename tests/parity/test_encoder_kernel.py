"""Encoders whose steps the native kernel computes, against transformers; an input's bits are its own."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoders import VOCAB, Oracle, answers, load, write_encoder
from support.stack import random_prompts

from salver.model.encoder import Masks, SelfAttention, build_encoder_batch
from salver.model.kernels.build import KernelUnavailable, find_or_build
from salver.model.kernels.encoder_program import NativeEncoder, unsupported
from salver.model.kernels.library import Library, Precision

CONTEXT = 150
LENGTHS = [5, 31, 1, 64, 130, 16, 65, 31]  # tiles of attention have 64 keys
TOLERANCE = 1e-4  # of outputs of about 1 to 10
# Three heads of 16: the kernel takes sixteen lanes at a time.
SIZES: dict[str, Any] = {"num_attention_heads": 3, "max_position_embeddings": CONTEXT + 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "BertForSequenceClassification": SIZES,
    "RobertaModel": SIZES,
    "ElectraForTokenClassification": SIZES,
    "AlbertModel": SIZES,
    "MPNetModel": SIZES,
    "DistilBertForQuestionAnswering": {"n_heads": 3, "max_position_embeddings": CONTEXT},
    "ModernBertForMaskedLM": {**SIZES, "local_attention": 40},
    "ModernBertForTokenClassification": {
        **SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
    },
    "NomicBertModel": SIZES,
}


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


def native(
    checkpoint: Path, library: Library, precision: Precision = Precision.FLOAT32, *, threads: int = 2
) -> Any:
    dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    return NativeEncoder(load(checkpoint, dtype), library, precision=precision, threads=threads)


def prompts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    """Ids from 3 on: none of them is padding to anybody."""
    return [[3 + i for i in ids] for ids in random_prompts(VOCAB - 3, lengths, 0)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_transformers_and_gives_an_input_its_bits(
    tmp_path: Path, library: Library, architecture: str
) -> None:
    checkpoint = write_encoder(tmp_path, architecture, **ARCHITECTURES[architecture])
    model, oracle = native(checkpoint, library), Oracle(checkpoint, architecture)
    inputs = prompts()
    alone = [answers(model, [ids])[0].clone() for ids in inputs]
    expected = [oracle(ids) for ids in inputs]
    assert max(float(e.std()) for e in expected if e.numel() > 1) > 0.3, "outputs this flat show nothing"
    for found, wanted in zip(alone, expected, strict=True):
        assert float((found - wanted).abs().max()) < TOLERANCE
    draw = random.Random(0)
    for _ in range(6):
        order = [draw.randrange(len(inputs)) for _ in range(draw.randrange(1, 30))]
        together = answers(model, [inputs[i] for i in order])
        assert all(torch.equal(found, alone[i]) for found, i in zip(together, order, strict=True))


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.INT8], ids=lambda p: p.name.lower())
@pytest.mark.parametrize(
    "architecture", ["BertForSequenceClassification", "AlbertModel", "ModernBertForMaskedLM"]
)
def test_rounded_weights_are_near_and_give_an_input_its_bits(
    tmp_path: Path, library: Library, architecture: str, precision: Precision
) -> None:
    checkpoint = write_encoder(tmp_path, architecture, **ARCHITECTURES[architecture])
    exact, rounded = native(checkpoint, library), native(checkpoint, library, precision)
    inputs = prompts()
    alone = [answers(rounded, [ids])[0].clone() for ids in inputs]
    for found, ids in zip(alone, inputs, strict=True):
        wanted = answers(exact, [ids])[0]
        error = float((found - wanted).norm() / wanted.norm())
        assert 0 < error < (0.03 if precision is Precision.BFLOAT16 else 0.1)
    together = answers(rounded, inputs[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_segments_and_any_number_of_threads(tmp_path: Path, library: Library) -> None:
    checkpoint = write_encoder(tmp_path, "BertForSequenceClassification", **SIZES)
    oracle = Oracle(checkpoint, "BertForSequenceClassification")
    inputs, kinds = prompts([9, 70]), [[0] * 4 + [1] * 5, [0] * 50 + [1] * 20]
    found = [answers(native(checkpoint, library, threads=n), inputs, kinds) for n in (1, 3)]
    for one, three, ids, segments in zip(*found, inputs, kinds, strict=True):
        assert torch.equal(one, three)
        assert float((one - oracle(ids, segments)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("architecture", ["MPNetModel", "ModernBertForMaskedLM"])
def test_attention_is_told_layer_by_layer(tmp_path: Path, library: Library, architecture: str) -> None:
    """The heads with their biases, windows and rotations give the weights that plain torch gives."""
    checkpoint = write_encoder(tmp_path, architecture, **ARCHITECTURES[architecture])
    inputs = prompts([70, 33])

    @torch.inference_mode()
    def told(model: Any) -> list[torch.Tensor]:
        batch = build_encoder_batch(model.spec, inputs, [[], []], row_multiple=1, device=model.device)
        found: list[torch.Tensor] = []

        def observe(step: int, attention: SelfAttention, heads: torch.Tensor, masks: Masks) -> None:
            rows = heads[batch.cu_seqlens[0] : batch.cu_seqlens[1]]
            found.append(attention.weights(rows, list(range(model.spec.num_heads)), masks))

        model(batch, None, observe)
        return found

    ours, theirs = told(native(checkpoint, library)), told(load(checkpoint))
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_it_does_not_know_is_refused_untouched(tmp_path: Path, library: Library) -> None:
    model = load(write_encoder(tmp_path, "BertModel"))  # heads of 12
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(KernelUnavailable, match="heads of 12"):
        NativeEncoder(model, library, precision=Precision.FLOAT32, threads=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert "quick_gelu" in str(unsupported(dataclasses.replace(model.spec, activation="quick_gelu")))


@torch.inference_mode()
def test_numbers_that_are_none_stay_in_their_input(tmp_path: Path, library: Library) -> None:
    checkpoint = write_encoder(tmp_path, "BertModel", **SIZES)
    model = load(checkpoint)
    broken = prompts()[1][0]
    model.embed.weight[broken] = float("nan")
    others = [[i if i != broken else broken - 1 for i in ids] for ids in prompts()]
    whole = NativeEncoder(model, library, precision=Precision.FLOAT32, threads=2)
    expected = [rows.clone() for rows in answers(whole, others)]
    mixed = answers(whole, [*others[:3], [broken, 5, 6], *others[3:]])
    assert bool(torch.isnan(mixed[3]).all())
    found = [*mixed[:3], *mixed[4:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
