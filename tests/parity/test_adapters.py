"""LoRA adapters against peft's own outputs, token for token: alone, with the base, cached, resumed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.stack import CPU
from transformers import AutoModelForCausalLM
from unit.test_engine_core import Sink, request

from salver.model.adapter_config import OF_TRAINING, READ, AdapterConfig
from salver.model.adapters import AdapterBase, AdapterSet, load_adapter
from salver.model.cache import KVCache
from salver.model.errors import CheckpointError
from salver.model.loader import load_model
from salver.server.engine import adapter_startup
from salver.server.engine.adapter_startup import read_adapter
from salver.server.engine.changes import AdapterSource
from salver.server.engine.core import EngineLimits
from salver.server.engine.drafts import PromptLookup, Speculation, StepCosts
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
from salver.server.engine.runner import ModelRunner

LENGTH = 16
PROMPTS = [[7, 8, 9, 10], [50, 60, 70] * 9, [100] * 20]
LIMITS = EngineLimits(
    num_blocks=80, block_size=8, max_model_len=128, max_num_seqs=16, max_num_batched_tokens=48,
    check_integrity=True,
)  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny_llama": {
        "all": {"r": 4, "lora_alpha": 16, "target_modules": LLAMA},
        "patterns": {
            "r": 4, "lora_alpha": 8, "target_modules": LLAMA, "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 40},
        },
        "some": {
            "r": 8, "lora_alpha": 32, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1],
            "layers_pattern": "layers", "exclude_modules": r".*layers\.0\..*",
            "init_lora_weights": "gaussian",
        },
    },
    "tiny_gpt2": {"all": {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"],
                          "fan_in_fan_out": True}},
}  # fmt: skip


def write_adapter(checkpoint: Path, directory: Path, seed: int, **config: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(**config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft begins with B = 0
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory


def of_peft(checkpoint: Path, adapter: Path | None) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A checkpoint and its adapters' directories."""
    checkpoint = request.getfixturevalue(request.param)
    root = tmp_path_factory.mktemp("adapters")
    configs = CONFIGS[request.param].items()
    return checkpoint, {
        name: write_adapter(checkpoint, root / name, seed, **config)
        for seed, (name, config) in enumerate(configs)
    }


def runner_of(checkpoint: Path, adapters: dict[str, Path]) -> ModelRunner:
    model = load_model(checkpoint, device=CPU, dtype=torch.float32, numerics="exact")
    cache = KVCache(model.spec, LIMITS.num_blocks, LIMITS.block_size, dtype=torch.float32, device=CPU)
    base = AdapterBase.of(model)
    loaded = {name: load_adapter(path, base) for name, path in adapters.items()}
    made = AdapterSet(model, loaded, 4)
    return ModelRunner(model, cache, block_size=LIMITS.block_size, row_multiple=4, adapters=made)


def asked(names: list[str]) -> list[EngineRequest]:
    greedy, stopping = SamplingParams(temperature=0.0), StoppingParams(LENGTH)
    return [
        replace(request(0, prompt, sampling=greedy), stopping=stopping, adapter=name, request_id=number)
        for number, (name, prompt) in enumerate((n, p) for p in PROMPTS for n in names)
    ]


def answers(runner: ModelRunner, items: list[EngineRequest], drafts: bool = False) -> list[list[int]]:
    free = StepCosts([(1, 1.0), (1000, 1.0)])
    speculation = Speculation(PromptLookup(), free, max_drafts=3) if drafts else None
    engine = InlineEngine(runner, LIMITS, clock=time.monotonic, speculation=speculation)
    sinks = [Sink() for _ in items]
    for item, sink in zip(items, sinks, strict=True):
        engine.submit(item, sink)
    engine.run(max_steps=1000)
    return [sink.tokens[0] for sink in sinks]


def test_equal_to_peft(family: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = family
    names = ["", *adapters]
    items = asked(names)
    truth = {name: of_peft(checkpoint, adapters.get(name)) for name in names}
    assert len({str(tokens) for tokens in truth.values()}) == len(names), "each says something else"
    expected = [truth[item.adapter][number // len(names)] for number, item in enumerate(items)]
    runner = runner_of(checkpoint, adapters)
    assert answers(runner, items) == expected, "all in one batch"
    assert answers(runner, items, drafts=True) == expected
    for item, tokens in list(zip(items, expected, strict=True))[::2]:
        assert answers(runner, [item]) == [tokens], "alone"
        cut = replace(item, outputs=(tuple(tokens[:9]),))
        assert answers(runner, [cut]) == [tokens[9:]], "resumed"


def test_a_cached_prefix_belongs_to_its_adapter(family: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = family
    engine = InlineEngine(runner_of(checkpoint, adapters), LIMITS, clock=time.monotonic)
    cached = []
    for name in ("", "all", "all", ""):
        sink = Sink()
        item = replace(asked([name])[1], request_id=len(cached))
        engine.submit(item, sink)
        engine.run()
        cached.append(sink.finish[0].num_cached_tokens)
    assert cached == [0, 0, 24, 24]


def test_every_field_of_peft_is_read_or_refused_by_name(tmp_path: Path) -> None:
    """Also those of versions to come: what is not known here and is set, is refused."""
    file = tmp_path / "adapter_config.json"
    for name in [field.name for field in fields(LoraConfig)]:
        if name in READ or name in OF_TRAINING:
            continue
        file.write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, name: {"some": 1}}))
        with pytest.raises(CheckpointError, match=f"{name} is .*, which is not implemented"):
            AdapterConfig(file)
    assert not (READ | OF_TRAINING) - {field.name for field in fields(LoraConfig)}


def test_a_rank_above_the_bound_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write_adapter(tiny_llama, tmp_path, 0, r=4, lora_alpha=8, target_modules=["q_proj"],
                  rank_pattern={"layers.1.self_attn.q_proj": 9})  # fmt: skip
    base = AdapterBase.of(load_model(tiny_llama, device=CPU, dtype=torch.float32, numerics="exact"))
    assert load_adapter(tmp_path, base, 9).rank == 9
    with pytest.raises(
        CheckpointError, match=r"layers\.1\..*q_proj\.lora_A\.weight is of rank 9, and at most 8"
    ):
        load_adapter(tmp_path, base, 8)


def test_what_does_not_fit_is_not_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_adapter(tiny_llama, tmp_path, 0, r=4, lora_alpha=8, target_modules=["q_proj"])
    base = AdapterBase.of(load_model(tiny_llama, device=CPU, dtype=torch.float32, numerics="exact"))
    size = (directory / "adapter_model.safetensors").stat().st_size
    monkeypatch.setattr(adapter_startup, "free_bytes", lambda: 4 * size)
    assert read_adapter(AdapterSource("a@1", str(directory)), base).rank == 4
    monkeypatch.setattr(adapter_startup, "free_bytes", lambda: 4 * size - 1)
    with pytest.raises(MemoryError, match=f"it takes about {4 * size} bytes, and {4 * size - 1} are free"):
        read_adapter(AdapterSource("a@1", str(directory)), base)


def changed(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_tensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def with_tokens(directory: Path, indices: list[int], rows: torch.Tensor, said: bool = False) -> None:
    """Rows of some tokens; `said`: also in the config."""
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    with_tensor(directory, lambda tensors: tensors.update({name: rows}))
    if said:
        changed(directory, trainable_token_indices=indices)


OTHER = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = {"base_model.model.model.norm.weight": torch.full((64,), 2.0)}


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda d: changed(d, use_dora=True), "q_proj.lora_magnitude_vector is missing"),
        (lambda d: changed(d, modules_to_save=["lm_head"]), "lm_head.weight of modules_to_save is missing"),
        (lambda d: changed(d, target_parameters=["down_proj.weight"]), "mlp.down_proj.lora_A.weight is miss"),
        (lambda d: changed(d, target_modules=["q_proj", "v_proj"]), "v_proj.lora_A.weight is missing"),
        (lambda d: with_tensor(d, lambda t: [t.pop(OTHER.format(k)) for k in "AB"]), "layers.1.self_att"),
        (lambda d: changed(d, trainable_token_indices=[5]), "tensor trainable_tokens_delta is missing"),
        (lambda d: with_tokens(d, [1, 2], torch.zeros(2, 64)), "is of no module in trainable_token_indices"),
        (lambda d: with_tokens(d, [1, 2], torch.zeros(3, 64), True), "trainable_tokens_delta has shape"),
        (lambda d: with_tokens(d, [1, 9999], torch.zeros(2, 64), True), "trainable_token_indices has 9999"),
        (lambda d: with_tokens(d, [1, 1], torch.zeros(2, 64), True), "token ids were expected"),
        (lambda d: changed(d, some_new_field=1), "some_new_field"),
        (lambda d: changed(d, target_modules=["v_proj"]), "q_proj.lora_A.weight is of no module in target"),
        (lambda d: changed(d, layers_to_transform=[1]), "layers.0.self_attn.q_proj.lora_A.weight is of no"),
        (lambda d: changed(d, target_modules="(q_proj"), "target_modules: "),
        (lambda d: changed(d, bias="some"), "bias is 'some'"),
        (lambda d: with_tensor(d, lambda t: t.update(NORM)), "differs from the base's"),
        (lambda d: changed(d, peft_type="IA3"), "IA3"),
        (lambda d: changed(d, r=5), "has shape"),
        (lambda d: changed(d, r="4"), "rank of"),
        (lambda d: changed(d, init_lora_weights="pissa_niter_4"), "pissa"),
        (lambda d: with_tensor(d, lambda t: t.pop(NAME)), "q_proj.lora_A.weight is missing"),
        (lambda d: with_tensor(d, lambda t: t.update({NAME: torch.zeros(4, 5)})), "lora_A.weight has shape"),
        (lambda d: with_tensor(d, lambda t: t[NAME].fill_(float("nan"))), "NaN"),
        (lambda d: with_tensor(d, lambda t: t.update(other=torch.zeros(1))), "tensor other"),
        (
            lambda d: with_tensor(d, lambda t: t.update({NAME.replace("q_proj", "x"): torch.zeros(4, 64)})),
            "self_attn.x.lora_A.weight is of no module in target_modules",
        ),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "neither"),
    ],
)  # fmt: skip
def test_a_bad_adapter_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, spoil: Callable[[Path], None], part: str
) -> None:
    write_adapter(tiny_llama, tmp_path, 0, r=4, lora_alpha=8, target_modules=["q_proj"])
    spoil(tmp_path)
    base = AdapterBase.of(load_model(tiny_llama, device=CPU, dtype=torch.float32, numerics="exact"))
    with pytest.raises(CheckpointError, match=re.escape(part)):
        load_adapter(tmp_path, base)
