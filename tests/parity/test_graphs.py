"""Decode steps through graphs, by a capture that computes again what it captured.

What a real capture adds (that nothing but the static memory is read) is held by replaying the very
computation: it has no other way to the step's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bookkeeping import Clock, request
from support.decoders import VARIANTS, write
from torch import Tensor

from salver.model.attention import AttentionBatch, Scoring
from salver.model.attention.reference import ReferenceAttention
from salver.model.cache import KVCache
from salver.model.loader import load_model
from salver.model.transformer import Transformer
from salver.server.engine.core import EngineLimits
from salver.server.engine.graphs import DecodeGraphs, GraphList, graph_sizes
from salver.server.engine.inline import InlineEngine
from salver.server.engine.launching import LaunchingModelRunner
from salver.server.engine.overlap import OverlappedCore
from salver.server.engine.request import FinishReason, SamplingParams, SequenceOutput

CPU = torch.device("cpu")
LIMITS = EngineLimits(64, 4, 96, 6, 32, check_integrity=True)


class DeviceAttention(ReferenceAttention):
    """As a GPU's kernel: knows of lengths and queries what is on the device, not what the host says."""

    reads_stale = False

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Scoring
    ) -> Tensor:
        starts, lengths = batch.on_device()
        told = AttentionBatch(starts.tolist(), lengths.tolist(), batch.block_tables, batch.slot_mapping)
        return super().__call__(query, cache, layer, told, scoring)


class FakeCapture:
    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        compute()

        def replay() -> None:
            self.replays += 1
            compute()

        return replay


class Sink:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def put(self, output: SequenceOutput) -> None:
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)

    def started(self, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("llama")
    write(directory, VARIANTS["Llama plain"])
    loaded = load_model(directory, device=CPU, dtype=torch.float32)
    loaded.attention = DeviceAttention()
    return loaded


def graphs(model: Transformer, cache: KVCache, capture: FakeCapture, listed: GraphList) -> DecodeGraphs:
    return DecodeGraphs(
        model, cache, max_num_seqs=LIMITS.max_num_seqs, max_model_len=LIMITS.max_model_len, listed=listed,
        capture=capture,
    )  # fmt: skip


def answers(model: Transformer, capture: FakeCapture | None, overlapped: bool = False) -> list[Any]:
    cache = KVCache(model.spec, LIMITS.num_blocks, LIMITS.block_size, dtype=torch.float32, device=CPU)
    runner = LaunchingModelRunner(model, cache, block_size=LIMITS.block_size, row_multiple=1)
    if capture is not None:
        runner.graphs = graphs(model, cache, capture, GraphList(None, ""))
    engine = InlineEngine(runner, LIMITS, clock=Clock())
    if overlapped:
        engine = InlineEngine.of(OverlappedCore(runner, LIMITS, clock=Clock()))
    sinks = []
    for number in range(8):
        sinks.append(Sink())
        sampling = SamplingParams(temperature=number % 2, seed=number)
        prompt = [(7 * number + i) % 97 for i in range(3 + number)]
        engine.submit(request(number, prompt, 4 + number, 1 + number % 2, sampling=sampling), sinks[-1])
        engine.step()
    engine.run()
    return [sink.tokens for sink in sinks]


def test_graphs_give_the_same_tokens(model: Transformer) -> None:
    capture = FakeCapture()
    assert answers(model, capture) == answers(model, None)
    assert capture.replays > 10
    assert capture.captures <= len(graph_sizes(LIMITS.max_num_seqs))


def test_steps_in_flight_give_the_same_tokens(model: Transformer) -> None:
    """The newest tokens are taken from the device; with graphs too, which share their memory."""
    expected = answers(model, None)
    assert answers(model, None, overlapped=True) == expected
    assert answers(model, FakeCapture(), overlapped=True) == expected


def test_a_row_in_flight_that_is_not_numbers_ends_its_request_alone(model: Transformer) -> None:
    cache = KVCache(model.spec, LIMITS.num_blocks, LIMITS.block_size, dtype=torch.float32, device=CPU)
    runner = LaunchingModelRunner(model, cache, block_size=LIMITS.block_size, row_multiple=1)
    whole = runner.logits

    def spoiled(hidden: Tensor, rows: list[int]) -> Tensor:
        logits = whole(hidden, rows)
        if len(rows) == 2:
            logits[1] = float("nan")
        return logits

    runner.logits = spoiled  # type: ignore[method-assign]
    core = OverlappedCore(runner, LIMITS, clock=Clock())
    for number in range(2):
        core.add(request(number, [5, 6, 7 + number], 6, sampling=SamplingParams(temperature=1.0)))
    ends: dict[int, tuple[FinishReason, str]] = {}
    while core.has_work:
        message = core.step()
        if message is not None:
            ends |= {o.request_id: (o.finish_reason, o.error) for o in message.outputs if o.finish_reason}
    assert ends[0] == (FinishReason.LENGTH, "")
    assert ends[1] == (FinishReason.ERROR, "the model's logits are not numbers")


def test_a_step_with_a_prompt_has_no_graph(model: Transformer) -> None:
    from salver.server.engine.batch import Part, build_batch

    cache = KVCache(model.spec, 16, 4, dtype=torch.float32, device=CPU)
    made = graphs(model, cache, FakeCapture(), GraphList(None, ""))
    decode, prompt = Part([5], 0, [1]), Part([5, 6], 0, [2])
    build = lambda parts: build_batch(parts, 4, row_multiple=1, device=CPU)  # noqa: E731
    assert made.run(build([decode, prompt])) is None
    assert made.run(build([Part([5], 0, [i + 1]) for i in range(7)])) is None
    found = made.run(build([decode]))
    assert found is not None and found.shape == (1, model.spec.hidden_size)
    assert made.captured == (1,)


def test_the_next_start_captures_what_the_last_one_used(model: Transformer, tmp_path: Path) -> None:
    from salver.server.engine.batch import Part, build_batch

    path = tmp_path / "graphs" / "list.json"
    cache = KVCache(model.spec, 16, 4, dtype=torch.float32, device=CPU)
    first, second, third = FakeCapture(), FakeCapture(), FakeCapture()
    made = graphs(model, cache, first, GraphList(path, "this model"))
    assert made.captured == ()
    for count in (3, 1, 3):
        parts = [Part([5], 0, [i + 1]) for i in range(count)]
        made.run(build_batch(parts, 4, row_multiple=1, device=CPU))
    assert first.captures == 2
    assert graphs(model, cache, second, GraphList(path, "this model")).captured == (1, 4)
    assert second.captures == 2
    assert graphs(model, cache, third, GraphList(path, "another")).captured == ()
    path.write_text(json.dumps({"key": "this model", "sizes": "many"}) + "}")
    assert GraphList(path, "this model").sizes == []


def test_a_capture_that_fails_costs_the_graphs_and_no_answer(
    model: Transformer, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeCapture):
        def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
            self.captures += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    capture = Failing()
    assert answers(model, capture) == answers(model, None)
    assert capture.captures == 1 and "not permitted" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 2, 5, 8, 32, 100, 256, 1000])
def test_sizes_rise_to_the_largest_and_waste_little(most: int) -> None:
    sizes = graph_sizes(most)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size < 2 * count if count <= 8 else size - count < 32
    assert len(sizes) <= 60


def test_models_that_ask_the_host_have_none(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from salver.model.config_reader import read_spec

    for name, expected in (("Llama plain", True), ("DeepseekV3 plain", False), ("Phi3 longrope", False)):
        config = VARIANTS[name].config_of()
        config.architectures = [VARIANTS[name].model]
        config.save_pretrained(tmp_path / name)
        fake: Any = SimpleNamespace(spec=read_spec(tmp_path / name))
        assert DecodeGraphs.can_have(fake) is expected
