"""New weights in a running engine: the answers of an engine that was started with them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.test_adapters import LLAMA, write_adapter
from support.bookkeeping import request
from support.checkpoints import write_tiny_llama
from unit.test_engine_core import Sink

from salver.model.kernels import build
from salver.server.engine.changes import AdapterSource, ApplyWeights, Changed, LoadAdapter, StageWeights
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore
from salver.server.engine.encoder_startup import start_any_engine
from salver.server.engine.request import Ready, SamplingParams, StoppingParams
from salver.server.engine.status_page import StatusPage
from salver.server.engine.updates import Updates

PROMPT = [50, 60, 70, 80] * 10
LENGTH = 16


def start(checkpoint: Path, **config: object) -> tuple[EngineCore, Ready, Updates]:
    made = EngineConfig(
        str(checkpoint), dtype="float32", device="cpu", threads=1, max_num_batched_tokens=128,
        check_integrity=True, weights_digest="first", **config,
    )  # fmt: skip
    core, ready = start_any_engine(made, StatusPage.create(), [], time.perf_counter())
    return core, ready, Updates(core, made, ready)


def done(updates: Updates) -> Changed:
    while (changed := updates.finish()) is None:
        time.sleep(0.001)
    return changed


class Engine:
    """Requests of a core, stepped by hand."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.sinks: dict[int, Sink] = {}

    def submit(self, adapter: str = "") -> Sink:
        number = len(self.sinks)
        greedy = request(number, PROMPT, sampling=SamplingParams(temperature=0.0))
        self.core.add(replace(greedy, stopping=StoppingParams(LENGTH), adapter=adapter))
        self.sinks[number] = Sink()
        return self.sinks[number]

    def step(self) -> None:
        message = self.core.step()
        for output in message.outputs if message else ():
            self.sinks[output.request_id].put(output)

    def tokens(self, adapter: str = "") -> tuple[list[int], int]:
        """And how many tokens of the prompt came from the cache."""
        sink = self.submit(adapter)
        while not sink.finish:
            self.step()
        return sink.tokens[0], sink.finish[0].num_cached_tokens


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("weights") / "other", seed=2)


@pytest.mark.parametrize("kernels", ["torch", "float32", "int8"])
def test_an_exchange(tiny_llama: Path, other: Path, kernels: str, cache_dir: Path) -> None:
    config: dict[str, object] = {"kernels": "torch"}
    if kernels != "torch":
        try:
            library = build.find_or_build(cache_dir)
        except build.KernelUnavailable as error:
            pytest.skip(str(error))
        quantization = "int8" if kernels == "int8" else "none"
        config = {"kernels": "native", "kernel_library": str(library), "quantization": quantization}
    new, _, _ = start(other, **config)
    expected, _ = Engine(new).tokens()
    core, ready, updates = start(tiny_llama, **config)
    engine = Engine(core)
    old, _ = engine.tokens()
    assert engine.tokens() == (old, 32) and old != expected
    kept = engine.submit()
    engine.step()
    engine.step()
    updates.begin(StageWeights(1, str(other), "second"))
    assert done(updates) == Changed(1)
    assert engine.tokens() == (old, 32), "nothing has changed"
    kept_again = engine.submit()
    engine.step()
    updates.begin(ApplyWeights(2, 1))
    changed = done(updates)
    assert changed.refusal is None and changed.numerics_id not in ("", ready.numerics_id)
    assert changed.numerics_id.partition("-")[0] == ready.numerics_id.partition("-")[0]
    assert engine.tokens() == (expected, 0)
    assert engine.tokens() == (expected, 32)
    assert kept.finish and kept_again.finish and kept_again.tokens[0] != expected
    core.check_integrity()
    updates.begin(ApplyWeights(3, 1))
    assert done(updates).refusal is not None, "they are applied once"


def test_adapters_stand_beside_the_new_weights(tiny_llama: Path, other: Path, tmp_path: Path) -> None:
    path = write_adapter(tiny_llama, tmp_path / "adapter", 0, r=4, lora_alpha=16, target_modules=LLAMA)
    core, ready, updates = start(tiny_llama, more_adapters=True)
    assert ready.adapters == ()
    updates.begin(LoadAdapter(1, AdapterSource("a@1", str(path))))
    loaded = done(updates)
    assert loaded.adapter is not None and loaded.adapter.rank == 4
    engine = Engine(core)
    before, _ = engine.tokens("a@1")
    updates.begin(StageWeights(2, str(other), "second"))
    updates.begin(ApplyWeights(3, 2))
    assert [done(updates).refusal for _ in range(2)] == [None, None]
    after, cached = engine.tokens("a@1")
    assert cached == 0 and after == truth(other, path) != before


def truth(checkpoint: Path, adapter: Path) -> list[int]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), adapter
    )
    ids = torch.tensor([PROMPT])
    whole = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return list(whole[0, len(PROMPT) :].tolist())
