"""Every way of adapting every family against peft: alone, in chunks, and all in one batch with the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import AdaptedStack, kinds_of, name_of, write_random_adapter
from support.decoders import VARIANTS, VOCAB, write
from support.encoders import Oracle, family_of, load, write_encoder
from support.stack import CPU, Stack, random_prompts

from salver.model.adapters import Adapter, AdapterBase, AdapterSet, load_adapter
from salver.model.cache import KVCache
from salver.model.errors import CheckpointError
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library, Precision
from salver.model.kernels.program import NativeTransformer
from salver.model.loader import load_model
from salver.model.transformer import Transformer
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.request import (
    EncodingParams,
    EngineRequest,
    Readout,
    SamplingParams,
    StoppingParams,
)
from salver.server.engine.schedule import Schedule, Scheduled
from salver.server.engine.sequence import Sequence

TOLERANCE = 2e-3
# One variant of each family: what differs between variants is not what adapters see.
FAMILIES = {name.partition(" ")[0]: name for name in reversed(VARIANTS)}

pytestmark = pytest.mark.usefixtures("one_thread")


def adapters_of(
    reference: Any, model: Transformer, root: Path, kinds: dict[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """The adapters as we read them, and peft's models; both by name."""
    base, loaded, theirs = AdapterBase.of(model), {}, {}
    for seed, (name, config) in enumerate((kinds or kinds_of(reference)).items()):
        theirs[name] = write_random_adapter(reference, root / name, seed, **config)
        loaded[name] = load_adapter(root / name, base)
    return loaded, theirs


@torch.inference_mode()
def logits(reference: Any, prompt: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference(torch.tensor([prompt])).logits[0]
    return found


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_what_peft_computes(name: str, tmp_path: Path) -> None:
    reference = write(tmp_path, VARIANTS[name])
    stack = AdaptedStack(tmp_path)
    assert isinstance(stack.model, Transformer)
    loaded, theirs = adapters_of(reference, stack.model, tmp_path)
    stack.put(AdapterSet(stack.model, loaded, 4))
    (prompt,) = random_prompts(VOCAB, [19])
    truth = {"": logits(reference, prompt)} | {n: logits(model, prompt) for n, model in theirs.items()}
    for kind, expected in truth.items():
        assert not kind or float((expected - truth[""]).abs().max()) > 100 * TOLERANCE, f"{kind} does nothing"
    stack.names = dict(enumerate(truth))
    crowd = stack.step([(number, prompt) for number in stack.names], padding=3)
    for (kind, expected), found in zip(truth.items(), crowd, strict=True):
        assert float((found - expected).abs().max()) < TOLERANCE, f"{kind} in a crowd"
    for number in stack.names:
        stack.end(number)
    for kind, expected in truth.items():
        stack.names[-1] = kind
        assert float((stack.logits(prompt, 7) - expected).abs().max()) < TOLERANCE, f"{kind} alone"


ENCODERS = {family_of(name): name for name in (
    "BertForSequenceClassification", "RobertaForSequenceClassification", "AlbertForTokenClassification",
    "DistilBertForQuestionAnswering", "ElectraForSequenceClassification",
    "ModernBertForSequenceClassification", "MPNetModel", "NomicBertForSequenceClassification",
    "DebertaV2ForSequenceClassification",
)}  # fmt: skip
OWN_DISTANCES = {"share_att_key": False}  # of DeBERTa: products of their own make them


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((name, {}) for name in ENCODERS.values()), (ENCODERS["DebertaV2"], OWN_DISTANCES)],
    ids=[*ENCODERS, "DebertaV2 own"],
)
def test_what_peft_computes_of_encoders(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """In one batch of the engine's runner, inputs of two lengths under every adapter and none."""
    write_encoder(tmp_path, architecture, **changes)
    model, oracle = load(tmp_path), Oracle(tmp_path, architecture)
    base, original = AdapterBase.of(model), oracle.model
    heads = [n for n, _ in original.named_children() if n in ("classifier", "score", "qa_outputs")]
    # The pooler of a body is in no checkpoint's answer.
    body = [name for name, _ in original.named_modules() if name == "pooler.dense"]
    linear = {"target_modules": "all-linear", "exclude_modules": [*body, *heads], "r": 3}
    kinds: dict[str, dict[str, Any]] = {
        "lora": {**linear, "modules_to_save": heads or None},
        "dora": {**linear, "use_dora": True, "bias": "all"},
        "table": {"target_modules": [name_of(original, original.get_input_embeddings())], "r": 2},
    }
    inputs = [[3 + token for token in ids] for ids in random_prompts(VOCAB - 3, [17, 9])]
    loaded, truth = {}, {"": [oracle(ids) for ids in inputs]}
    for seed, (name, config) in enumerate(kinds.items()):
        oracle.model = write_random_adapter(original, tmp_path / name, seed, **config)
        truth[name] = [oracle(ids) for ids in inputs]
        loaded[name] = load_adapter(tmp_path / name, base)
        assert float((truth[name][0] - truth[""][0]).abs().max()) > 10 * TOLERANCE, f"{name} does nothing"
    runner = EncoderRunner(model, row_multiple=4, adapters=AdapterSet(model, loaded, 4))
    readout = Readout.TOKENS if model.spec.head is None else Readout.SCORES
    schedule = Schedule(
        [
            scheduled(number, ids, readout, name)
            for number, (name, ids) in enumerate((name, ids) for name in truth for ids in inputs)
        ]
    )
    expected = [answer for answers in truth.values() for answer in answers]
    for wanted, found in zip(expected, runner.execute(schedule).rows, strict=True):
        assert found.arrays and not found.error
        ours = torch.from_numpy(found.arrays[0]).view(wanted.shape)
        assert float((ours - wanted).abs().max()) < TOLERANCE


def scheduled(number: int, ids: list[int], readout: Readout, adapter: str) -> Scheduled:
    """A whole input."""
    request = EngineRequest(
        number, tuple(ids), SamplingParams(), StoppingParams(0), adapter=adapter,
        encoding=EncodingParams(readout, whole=True),
    )  # fmt: skip
    return Scheduled(Sequence(request, 0, (), (0, 0.0, 0.0, 1, 0)), 0, len(ids))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_that_were_modules(family: str, tmp_path: Path) -> None:
    """As transformers 4 had them: an adapter of each expert's linear maps, of ranks of their own."""
    reference = write(tmp_path, VARIANTS[FAMILIES[family]])
    parts = "w1 w3 w2" if family == "Mixtral" else "gate_proj up_proj down_proj"
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate", *parts.split()],
        "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path),
    }  # fmt: skip
    spec = AdapterBase.of(load_model(tmp_path, device=CPU, dtype=torch.float32))
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in config["target_modules"] and tensor.dim() == 2:
            out, width = tensor.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.3 * torch.randn(2, width)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.3 * torch.randn(out, 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(reference, adapter).eval()
    (prompt,) = random_prompts(VOCAB, [19])
    expected = logits(theirs, prompt)
    stack = AdaptedStack(tmp_path)
    stack.put(AdapterSet(stack.model, {"experts": load_adapter(adapter, spec)}, 4))
    base = stack.logits(prompt)
    stack.names[-1] = "experts"
    assert float((stack.logits(prompt, 7) - expected).abs().max()) < TOLERANCE
    assert float((base - expected).abs().max()) > 100 * TOLERANCE


# ---- the native kernel ----


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


@pytest.mark.parametrize("precision", Precision, ids=lambda precision: precision.name.lower())
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_native_kernel(
    family: str, precision: Precision, library: Library, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What peft computes, in float32; and the same bits alone, in chunks and in a crowd."""
    from transformers import AutoModelForCausalLM

    checkpoint = request.getfixturevalue(family)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    dtype = torch.float32 if precision is Precision.FLOAT32 else torch.bfloat16
    model = load_model(checkpoint, device=CPU, dtype=dtype)
    loaded, theirs = adapters_of(reference, model, tmp_path)
    cache = KVCache(model.spec, 60, 16, dtype=dtype, device=CPU)
    native = NativeTransformer(model, cache, library, precision=precision, threads=2)
    stack = AdaptedStack.of(native, cache)
    assert isinstance(stack, AdaptedStack)
    stack.put(AdapterSet(native, loaded))
    (prompt,) = random_prompts(model.spec.vocab_size, [19])
    names = ["", *loaded]
    stack.names = dict(enumerate(names))
    crowd = stack.step([(number, prompt) for number in stack.names])
    for number, name in enumerate(names):
        stack.end(number)
        if precision is Precision.FLOAT32:
            expected = logits(theirs.get(name, reference), prompt)
            assert float((crowd[number] - expected).abs().max()) < TOLERANCE, name
        for chunk in (None, 5):
            stack.names[-1] = name
            assert torch.equal(stack.logits(prompt, chunk), crowd[number]), f"{name} in chunks of {chunk}"
    plain = Stack.of(
        NativeTransformer(
            load_model(checkpoint, device=CPU, dtype=dtype), cache, library, precision=precision, threads=2
        ),
        cache,
    )
    assert torch.equal(plain.logits(prompt), crowd[0]), "the base has the bits that it has without adapters"


def test_the_native_kernel_refuses_whole_weights_of_layers(
    tiny_llama: Path, library: Library, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = load_model(tiny_llama, device=CPU, dtype=torch.float32)
    kinds = {
        "whole": {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["model.layers.1.mlp.down_proj"]}
    }
    loaded, theirs = adapters_of(reference, model, tmp_path, kinds)
    cache = KVCache(model.spec, 20, 16, dtype=torch.float32, device=CPU)
    stack = AdaptedStack.of(model, cache)
    assert isinstance(stack, AdaptedStack)
    stack.put(AdapterSet(model, loaded))
    stack.names[-1] = "whole"
    (prompt,) = random_prompts(model.spec.vocab_size, [9])
    expected = logits(theirs["whole"], prompt)
    assert float((stack.logits(prompt) - expected).abs().max()) < TOLERANCE, "plain torch does it"
    native = NativeTransformer(model, cache, library, precision=Precision.FLOAT32, threads=1)
    with pytest.raises(CheckpointError, match=r"layers\.1\.down\.weight"):
        AdapterSet(native, loaded)
