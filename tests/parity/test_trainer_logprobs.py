"""Log-probabilities that a trainer can use: transformers' own in float32, by the engine, to 1e-4."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support import exactness
from support.stack import random_prompts
from transformers import AutoModelForCausalLM

from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import Library
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SamplingParams, SequenceOutput, StoppingParams

pytestmark = pytest.mark.usefixtures("one_thread")


class Told:
    """The tokens, and what was told of them and of the prompt's."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def put(self, output: SequenceOutput) -> None:
        self.tokens += output.token_ids
        self.logprobs += [
            told.logprob for told in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))
        ]

    def started(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_equal_to_transformers(
    family: str, kernels: str, cache_dir: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(family)
    library = None
    if kernels == "native":
        try:
            library = Library(build.find_or_build(cache_dir))
        except KernelUnavailable as error:
            pytest.skip(f"no native kernel here: {error}")
    runner = exactness.runner_of(checkpoint, "float32", library)
    engine = InlineEngine(runner, exactness.ROOMY, clock=itertools.count().__next__)
    prompts, sinks = random_prompts(runner.model.spec.vocab_size, [23, 7, 40]), []
    for number, prompt in enumerate(prompts):
        sinks.append(Told())
        asked = EngineRequest(
            number, tuple(prompt), SamplingParams(temperature=0.9, seed=number), StoppingParams(12),
            outputs=((),), output_top_k=0, prompt_top_k=0,
        )  # fmt: skip
        engine.submit(asked, sinks[-1])
    engine.run()
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, sink in zip(prompts, sinks, strict=True):
        whole = torch.tensor([[*prompt, *sink.tokens]])
        with torch.inference_mode():
            expected = reference(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        assert sink.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
