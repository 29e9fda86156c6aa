"""Models whose matrices are divided among ranks give what the undivided one gives.

The maths of many families by ranks that are threads here; the processes, their pipes and Gloo by one worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_tiny_gpt2
from support.decoders import VARIANTS, Variant, write
from support.ranks_worker import answers
from support.stack import BLOCK_SIZE, CPU, Stack
from torch import Tensor

from salver.model.cache import KVCache
from salver.model.config_reader import read_spec
from salver.model.errors import CheckpointError
from salver.model.loader import load_model
from salver.model.parallel import Ranks, Sharding
from salver.model.spec import HeadNorm, NormSpec

PROMPTS = [[3, 14, 15, 92, 65, 35], [8, 9, 79], [32, 38, 46, 26, 43, 38, 32, 79, 50]]
NAMES = [
    *("GPT2", "Llama biases", "Mixtral plain", "Bloom plain", "Falcon plain"),
    *("Gemma2 plain", "GptOss plain", "DeepseekV3 plain", "StableLm qk"),
]


class Meeting:
    """Ranks in threads: whoever comes leaves a tensor and takes what all left."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._left: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor, combine: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        self._left[rank] = x.clone()
        self._barrier.wait(60)
        found = combine(self._left)
        self._barrier.wait(60)
        return found

    def ranks(self, rank: int) -> Ranks:
        return Ranks(
            rank,
            len(self._left),
            lambda x: self.exchange(rank, x, lambda parts: torch.stack(list(parts)).sum(0)),
            lambda x: self.exchange(rank, x, lambda parts: torch.cat(list(parts), dim=1)),
        )


def steps(stack: Stack) -> list[Tensor]:
    """Logits of prompts in chunks beside decoding."""
    found = stack.step([(0, PROMPTS[0]), (1, PROMPTS[1])])
    found += stack.step([(2, PROMPTS[2][:4]), (0, [5]), (1, [6])])
    found += stack.step([(2, PROMPTS[2][4:]), (0, [7])], padding=2)
    return found


def divided(directory: Path, size: int) -> list[list[Tensor]]:
    meeting = Meeting(size)

    def run(rank: int) -> list[Tensor]:
        model = load_model(directory, device=CPU, dtype=torch.float32, ranks=meeting.ranks(rank))
        cache = KVCache(model.spec, 60, BLOCK_SIZE, dtype=torch.float32, device=CPU)
        return steps(Stack.of(model, cache))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_logits_of_one(name: str, tmp_path: Path) -> None:
    if name == "GPT2":
        write_tiny_gpt2(tmp_path)
    else:
        write(tmp_path, VARIANTS[name])
    expected = steps(Stack(tmp_path, num_blocks=60))
    for of_rank in divided(tmp_path, 2):
        for found, whole in zip(of_rank, expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=0, atol=2e-3)
            assert torch.equal(found.argmax(-1), whole.argmax(-1))


def test_more_ranks_than_heads_of_keys(tmp_path: Path) -> None:
    """Two heads of keys at four ranks: each is at two of them. 97 tokens are not four equal parts either."""
    write(tmp_path, VARIANTS["Llama plain"])
    expected = steps(Stack(tmp_path, num_blocks=60))
    for found, whole in zip(divided(tmp_path, 4)[3], expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-3)


def spec_of(variant: Variant, directory: Path) -> Any:
    config = variant.config_of()
    config.architectures = [variant.model]
    config.save_pretrained(directory)
    return read_spec(directory)


def test_every_value_is_at_some_rank(tmp_path: Path) -> None:
    """Of each parameter that is divided the parts are disjoint and together all of it."""
    from salver.model.attention.reference import ReferenceAttention
    from salver.model.transformer import Transformer

    for name in ("DeepseekV3 plain", "GptOss plain", "Bloom plain"):
        spec = spec_of(VARIANTS[name], tmp_path / name)
        with torch.device("meta"):
            model = Transformer(spec, ReferenceAttention())
        for parameter_name, parameter in model.named_parameters():
            whole = torch.arange(1, parameter.numel() + 1).view(parameter.shape)
            parts = [Sharding(spec, rank, 2).part(parameter_name) for rank in range(2)]
            if parts[0] is None or parts[1] is None:
                assert parts == [None, None]
                continue
            both = torch.cat([part.of(whole).flatten() for part in parts if part is not None])
            assert sorted(both[both > 0].tolist()) == list(range(1, parameter.numel() + 1)), parameter_name


def test_what_cannot_be_divided_is_said(tmp_path: Path) -> None:
    spec = spec_of(VARIANTS["Llama plain"], tmp_path)
    norm = HeadNorm(NormSpec("rms", 1e-6), "all")
    for changed, size, words in (
        (spec, 3, "4 heads"),
        (replace(spec, intermediate_size=41), 2, "41 columns"),
        (replace(spec, num_heads=6, num_kv_heads=3), 2, "3 heads of keys"),
        (replace(spec, head_norm=norm), 2, "over all heads"),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            Sharding(changed, 0, size)
        assert "--tensor-parallel-size" in str(error.value)


def test_a_worker_of_two_processes_gives_the_same_tokens_and_ends_with_either(tmp_path: Path) -> None:
    write(tmp_path, VARIANTS["Llama plain"])
    command = [sys.executable, "-m", "support.ranks_worker", str(tmp_path), "2"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as worker:  # fmt: skip
        threads = torch.get_num_threads()
        expected = answers(str(tmp_path), 1)
        torch.set_num_threads(threads)
        assert worker.stdout is not None and worker.stderr is not None
        found = worker.stdout.readline().rstrip()
        assert found == expected, worker.communicate()[1]
        pid = int(worker.stdout.readline())
        os.kill(pid, signal.SIGKILL)  # a rank dies: so does the worker, and the front starts it again
        assert worker.wait(timeout=60) == 70
        assert f"rank process {pid} ended" in worker.stderr.read()


def test_ranks_end_with_their_worker(tmp_path: Path) -> None:
    """A rank whose pipe closes has nobody to compute for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "salver.server.engine.rank", "--rank", "1", "--store", str(tmp_path / "s")],
        stdin=subprocess.PIPE,
    )
    process.communicate(b"", timeout=120)
    assert process.returncode == 0
