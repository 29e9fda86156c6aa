"""A worker of some ranks as a program: prints the tokens of some requests, its ranks, and waits to be ended.

`python -m support.ranks_worker CHECKPOINT SIZE`
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from salver.server.engine.config import EngineConfig
from salver.server.engine.encoder_startup import start_any_engine
from salver.server.engine.inline import InlineEngine
from salver.server.engine.request import EngineRequest, SamplingParams, SequenceOutput, StoppingParams
from salver.server.engine.status_page import StatusPage


class Sink:
    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def put(self, output: SequenceOutput) -> None:
        self.tokens.setdefault(output.sample_index, []).extend(output.token_ids)

    def started(self, seconds: float) -> None:
        pass


def answers(checkpoint: str, size: int) -> str:
    """Tokens and the number of the model's parameters."""
    config = EngineConfig(
        checkpoint, device="cpu", dtype="float32", threads=1, max_model_len=96, max_num_seqs=4,
        max_num_batched_tokens=32, tensor_parallel_size=size,
    )  # fmt: skip
    core, ready = start_any_engine(config, StatusPage.create(), [], time.perf_counter())
    engine, sinks = InlineEngine.of(core), [Sink() for _ in range(3)]
    for number, sink in enumerate(sinks):
        sampling = SamplingParams(temperature=number % 2, seed=7)
        prompt = tuple(range(3, 9 + number))
        engine.submit(EngineRequest(number, prompt, sampling, StoppingParams(9), (0, 1), ((), ())), sink)
    engine.run()
    return f"{[sink.tokens for sink in sinks]} {ready.num_parameters}"


def main() -> None:
    print(answers(sys.argv[1], int(sys.argv[2])), flush=True)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    print(children.strip(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
