"""What the path to a GPU can show without one: copies, transfers, where tensors are, whose memory fails.

The meta device computes shapes alone; here an operation on tensors of two devices is an error too, and so is
reading a number on the host, as it would be (or would wait) on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bookkeeping import BookkeepingRunner, Clock, request
from support.decoders import VARIANTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salver.model import transfer
from salver.model.attention import Attention, AttentionBatch
from salver.model.cache import KVCache
from salver.model.config_reader import read_spec
from salver.model.sampling import INVALID, SamplingRow, choose, sample
from salver.model.transfer import Staging, on_device
from salver.model.transformer import Transformer
from salver.server.engine.batch import Part, build_batch
from salver.server.engine.core import EngineCore, EngineLimits, StepResult
from salver.server.engine.request import FinishReason
from salver.server.engine.runner import within_memory
from salver.server.engine.schedule import Schedule

CPU, META = torch.device("cpu"), torch.device("meta")


class OneDevice(TorchDispatchMode):
    """As CUDA: tensors of an operation are on one device, but for copies and for single numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
            assert len(devices) <= 1, f"{func} of tensors on {devices}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64, 3), (3, 200), (5, 4, 6), (0, 4)])
def test_weights_come_whole_through_the_buffers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Pieces of 64 bytes, rows longer than that, targets of another type and turned ones."""
    staging = Staging(CPU, piece_bytes=64, direct=False)
    for _ in range(2):
        source = torch.randn(shape).to(dtype)
        target = torch.full(shape, float("nan"))
        staging.copy(source, target)
        assert torch.equal(target, source.float())
        turned = torch.full(shape[::-1], float("nan"))
        staging.copy(source, turned.permute(tuple(reversed(range(len(shape))))))
        assert torch.equal(turned, source.float().permute(tuple(reversed(range(len(shape))))))


def test_a_batch_is_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def counted(device: torch.device, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        sent.append(len(values))
        return transfer.tensor_on(device, values, dtype)

    monkeypatch.setattr("salver.server.engine.batch.tensor_on", counted)
    parts = [Part([5, 6, 7], 2, [3, 1]), Part([9], 8, [2, 4, 6])]
    batch = build_batch(parts, 4, row_multiple=3, device=CPU)
    assert len(sent) == 1
    assert batch.token_ids.tolist() == [5, 6, 7, 9, 0, 0]
    assert batch.positions.tolist() == [2, 3, 4, 8, 0, 0]
    assert batch.attention.slot_mapping.tolist() == [14, 15, 4, 24, 0, 1]
    assert batch.attention.block_tables.tolist() == [[3, 1, 0], [2, 4, 6]]
    starts, lengths = batch.attention.on_device()
    assert (starts.tolist(), lengths.tolist()) == (batch.attention.cu_seqlens_q, batch.attention.seq_lens)


def row(**changes: Any) -> SamplingRow:
    values: dict[str, Any] = {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (), "seed": 3, "sample_index": 0,
        "prompt_token_ids": (1, 2, 3), "output_token_ids": (2, 5),
    }  # fmt: skip
    return SamplingRow(**values | changes)


ROWS = [
    row(),
    row(temperature=1.0),
    row(temperature=0.7, top_k=5, seed=9),
    row(temperature=1.3, min_p=0.1, typical_p=0.8, sample_index=2),
    row(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((4, 2.0),)),
    row(banned_token_ids=(7,), bad_words=((5, 6),), no_repeat_ngram_size=2),
    row(allowed_token_ids=(3, 4), stop_token_ids=(2,)),
    row(temperature=1.0, top_p=0.9),
]


def test_tokens_are_chosen_on_the_device_of_the_logits() -> None:
    with OneDevice():
        chosen = choose(torch.empty(len(ROWS), 50, device=META), ROWS)
    assert chosen.device == META and chosen.shape == (len(ROWS),)


def test_a_mixture_of_devices_is_found() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="tensors on"):
        torch.empty(3, device=META) + torch.zeros(3)


def test_rows_of_no_numbers_draw_no_token() -> None:
    logits = torch.randn(4, 50)
    logits[1], logits[2, 7] = float("-inf"), float("nan")
    expected = sample(logits[::3], [row(temperature=1.0)] * 2)
    assert sample(logits, [row(temperature=1.0)] * 4) == [expected[0], INVALID, INVALID, expected[1]]


class Anywhere:
    """Attention of the right shape, by operations that run on any device."""

    reads_stale = False

    def __call__(
        self, query: Tensor, cache: KVCache, layer: int, batch: AttentionBatch, scoring: Any
    ) -> Tensor:
        keys = cache.keys(layer)[batch.block_tables]
        group = query.shape[1] // cache.num_kv_heads
        positions = batch.block_tables.new_zeros((1, 4))
        scores = query.new_zeros(1, cache.num_kv_heads, group, 1, 4)
        scores = scoring.adjust(scores, positions, positions[:, :1])
        assert scoring.sinks is None or scoring.sinks.device == query.device
        return query.flatten(1) + keys.sum() * 0 + scores.sum() * 0


DENSE_LATENT = replace(
    VARIANTS["DeepseekV3 plain"],
    config={**VARIANTS["DeepseekV3 plain"].config, "first_k_dense_replace": 3},  # experts wait for the device
)
STEPS = {
    name: VARIANTS[name]
    for name in (
        "Llama plain",
        "Bloom plain",
        "Falcon plain",
        "XGLM plain",
        "OPT plain",
        "Gemma2 plain",
        "Phi3 longrope",
    )
} | {"latent": DENSE_LATENT}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_on_its_device(name: str, tmp_path: Path) -> None:
    attention: Attention = Anywhere()
    config = STEPS[name].config_of()
    config.architectures = [STEPS[name].model]
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    with torch.device(META):
        model = Transformer(spec, attention)
    model.place(META)
    cache = KVCache(spec, 6, 4, dtype=torch.float32, device=META)
    ids, positions = (torch.zeros(6, dtype=torch.int64, device=META) for _ in range(2))
    tables = torch.zeros((2, 3), dtype=torch.int64, device=META)
    batch = AttentionBatch([0, 4, 5], [9, 6], tables, positions, [9, 6])
    with OneDevice():
        hidden = model(ids, positions, cache, batch)
        assert model.logits(hidden).device == META


def test_a_cuda_allocation_that_fails_ends_its_request_alone() -> None:
    """The error that torch raises for a GPU, through the halving of the step; the others' tokens stay."""

    class Full(BookkeepingRunner):
        def execute(self, schedule: Schedule) -> StepResult:
            def compute(step: Schedule) -> StepResult:
                if any(13 in item.sequence.token_ids for item in step.scheduled):
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                return super(Full, self).execute(step)

            return within_memory(compute, schedule, CPU)

    limits = EngineLimits(33, 4, 96, 6, 64, check_integrity=True)
    core = EngineCore(Full(), limits, clock=Clock())
    for number, prompt in enumerate(([1, 2], [4, 13, 5], [6], [7, 8, 9])):
        core.add(request(number, prompt, 4))
    ends: dict[int, tuple[FinishReason, str]] = {}
    while core.has_work:
        message = core.step()
        assert message is not None
        ends |= {o.request_id: (o.finish_reason, o.error) for o in message.outputs if o.finish_reason}
    assert ends.pop(1) == (FinishReason.MEMORY, "CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert set(ends) == {0, 2, 3} and {reason for reason, _ in ends.values()} == {FinishReason.LENGTH}


def test_nothing_is_pinned_for_a_cpu() -> None:
    host = torch.arange(3)
    assert on_device(host, CPU) is host
