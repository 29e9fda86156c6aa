"""Every decoder family against transformers, in every variant, however the work is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decoders import VARIANTS, VOCAB, Variant, write
from support.stack import Stack, random_prompts

from salver.model import loader
from salver.model.config_reader import read_spec
from salver.model.errors import CheckpointError
from salver.model.spec import (
    AlibiPositions,
    LearnedPositions,
    ModelSpec,
    RopePositions,
    SinusoidalPositions,
)

TOLERANCE = 1e-3
HALF = (
    "Gemma2 plain", "Gemma3 scaled", "Bloom six", "Mpt tuned", "GptOss plain", "DeepseekV3 plain",
    "Olmoe clip", "OPT post", "XGLM plain",
)  # fmt: skip
LENGTHS = (5, 61)  # the second is beyond every window and every original context here


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write(tmp_path, VARIANTS[name])
    stack = Stack(tmp_path)
    for length in LENGTHS:
        (prompt,) = random_prompts(VOCAB, [length])
        expected = logits(reference, prompt)
        assert expected.std() > 1, "logits this flat would show nothing"
        for chunk in (None, 7, 1):
            assert float((stack.logits(prompt, chunk) - expected).abs().max()) < TOLERANCE
    tokens_are_the_same(reference, stack)
    every_knob_shows(stack, tmp_path, prompt, expected, monkeypatch)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_half_precision(name: str, numerics: str, tmp_path: Path) -> None:
    """As near to the float32 truth as transformers in bfloat16."""
    reference = write(tmp_path, VARIANTS[name])
    (prompt,) = random_prompts(VOCAB, [61])
    truth = logits(reference, prompt)
    theirs = (logits(reference.to(torch.bfloat16), prompt).float() - truth).abs().mean()
    stack = Stack(tmp_path, dtype=torch.bfloat16, numerics=numerics)
    for chunk in (None, 9, 1):
        assert (stack.logits(prompt, chunk) - truth).abs().mean() < 1.5 * theirs


@torch.inference_mode()
def logits(reference: Any, prompt: list[int]) -> torch.Tensor:
    """[n, vocab]"""
    found: torch.Tensor = reference(torch.tensor([prompt])).logits[0]
    return found


def tokens_are_the_same(reference: Any, stack: Stack) -> None:
    """transformers' greedy tokens; and ours alone, in chunks, in a crowd."""
    prompts = random_prompts(VOCAB, [40, 3, 17], seed=1)
    logits(
        reference, prompts[1]
    )  # a rope that grew for the last prompt stays so in transformers until a short one
    ids = torch.tensor(prompts[:1])
    whole = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    alone = [stack.greedy(prompt, 8) for prompt in prompts]
    assert alone[0] == whole[0, 40:].tolist()
    assert [stack.greedy(prompt, 8, chunk=5) for prompt in prompts] == alone
    assert stack.greedy_together(prompts, 8, chunk=16) == alone


def every_knob_shows(
    stack: Stack, checkpoint: Path, prompt: list[int], expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spec that is wrong in one field gives other logits, or does not fit the checkpoint."""
    seen = 0
    for what, broken in broken_specs(stack.model.spec):
        monkeypatch.setattr(loader, "read_spec", lambda _, broken=broken: broken)
        try:
            found = Stack(checkpoint, num_blocks=40).logits(prompt)
        except (CheckpointError, ValueError, RuntimeError):
            continue
        seen += 1
        assert float((found - expected).abs().max()) > 10 * TOLERANCE, what
    assert seen >= 3


def broken_specs(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """The spec, wrong in one field each, and what is wrong."""
    for described in fields(spec):
        value, usual = getattr(spec, described.name), described.default
        if (
            usual is not MISSING
            and value != usual
            and described.name not in ("bos_token_id", "eos_token_ids")
        ):
            yield described.name, changed(spec, **{described.name: usual})
        if isinstance(value, float) and value != usual:
            yield f"{described.name} doubled", changed(spec, **{described.name: 2 * value})
    yield "norm.eps", replace(spec, norm=replace(spec.norm, eps=spec.norm.eps + 0.1))
    yield "activation", replace(spec, activation="silu" if spec.activation == "relu" else "relu")
    yield "attention_multiplier", replace(spec, attention_multiplier=1.3 * spec.attention_scale)
    if spec.norm.offset:
        yield "norm.offset", replace(spec, norm=replace(spec.norm, offset=0.0))
    if spec.windows:
        windows = tuple(None if window is None else window + 1 for window in spec.windows)
        yield "windows widened", replace(spec, windows=windows)
    if spec.experts is not None:
        for name in ("normalized", "shared_gate"):
            flipped = {name: not getattr(spec.experts, name)}
            yield f"experts.{name}", replace(spec, experts=changed(spec.experts, **flipped))
        fewer = replace(spec.experts, per_token=spec.experts.per_token - 1)
        yield "experts.per_token", replace(spec, experts=fewer)
        yield "experts.scale", replace(spec, experts=replace(spec.experts, scale=1.5 * spec.experts.scale))
    yield from broken_positions(spec)


def changed(what: Any, **values: Any) -> Any:
    return replace(what, **values)


def broken_positions(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Of the positions, and of those that only some layers have."""
    places: list[tuple[int | None, Any]] = [(None, spec.positions)]
    if spec.ropes:
        places = list(enumerate(spec.ropes))
    for layer, positions in places:
        for changed in other_positions(positions, spec.head_dim):
            ropes = tuple(changed if i == layer else rope for i, rope in enumerate(spec.ropes))
            wrong = replace(spec, ropes=ropes) if layer is not None else replace(spec, positions=changed)
            yield f"{changed} in layer {layer}", wrong


def other_positions(positions: Any, head_dim: int) -> Iterator[Any]:
    if isinstance(positions, AlibiPositions):
        yield replace(positions, slopes=positions.slopes[::-1])
        yield replace(positions, multiplier=2 * positions.multiplier)
    elif isinstance(positions, LearnedPositions | SinusoidalPositions):
        yield replace(positions, offset=positions.offset + 1)
    elif isinstance(positions, RopePositions):
        yield replace(positions, theta=3 * positions.theta)
        if positions.rotary_dim:
            yield replace(positions, rotary_dim=positions.rotary_dim - 2 or head_dim)
        if positions.scaling != "default":
            yield replace(positions, scaling="default")
        if positions.scaling in ("linear", "dynamic", "yarn", "llama3"):
            yield replace(positions, factor=3 * positions.factor)
        if positions.attention_factor != 1:
            yield replace(positions, attention_factor=1.0)
        if positions.scaling == "longrope":
            yield replace(positions, long_factors=positions.short_factors)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_of_transformers_4_says_the_same(name: str, tmp_path: Path) -> None:
    """`rope_parameters` came with 5; before, its parts stood in the config and in `rope_scaling`."""
    config = VARIANTS[name].config_of()
    config.architectures = [VARIANTS[name].model]
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_before(json.loads(path.read_text()))))
    assert read_spec(tmp_path) == spec


def as_before(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 wrote it."""
    config["torch_dtype"] = config.pop("dtype", "float32")
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    if "sliding_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        config["rotary_pct" if neox else "partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return config


def test_experts_packed_to_four_bits(tmp_path: Path) -> None:
    """GPT-OSS as it was published: MXFP4, unpacked by transformers for the oracle."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 32, "intermediate_size": 64}
    reference = Variant("GptOssForCausalLM", {**VARIANTS["GptOss plain"].config, **sizes}).build()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        count, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, (count, rows, columns // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        reference.get_parameter(name).data.copy_(unpacked)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (prompt,) = random_prompts(VOCAB, [61])
    expected = logits(reference, prompt)
    assert expected.std() > 0.3
    assert float((Stack(tmp_path).logits(prompt) - expected).abs().max()) < TOLERANCE


def test_a_long_prompt_in_a_crowd_of_short_ones(tmp_path: Path) -> None:
    """Ropes that grow do so for one sequence, not for the step."""
    for name in ("Llama dynamic", "Llama longrope"):
        write(tmp_path / name, VARIANTS[name])
        stack = Stack(tmp_path / name)
        prompts = random_prompts(VOCAB, [50, 4, 30, 23, 25], seed=2)
        random.Random(0).shuffle(prompts)
        alone = [stack.greedy(prompt, 6) for prompt in prompts]
        assert stack.greedy_together(prompts, 6, chunk=11) == alone
