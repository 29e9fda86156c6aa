"""The engine driven in process: no front, no pipe, no gRPC, no text. Answers as `baseline.py` does.

The same checkpoint, kernel, threads and step size as a served engine has; what remains between the
two is the service.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks.baseline import protocol_stream
from salver.model.kernels.build import KernelUnavailable, find_or_build
from salver.server.catalog import default_cache_dir
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore
from salver.server.engine.request import EngineRequest, Ready, SamplingParams, StoppingParams
from salver.server.engine.startup import start_engine
from salver.server.engine.status_page import StatusPage


def start(checkpoint: Path, *, dtype: str, threads: int, **changes: Any) -> tuple[EngineCore, Ready]:
    """A warm engine in this process, as the worker makes it."""
    kernel, missing = "", ""
    try:
        kernel = str(find_or_build(default_cache_dir()))
    except KernelUnavailable as error:
        missing = str(error)
    config = EngineConfig(
        str(checkpoint), device="cpu", dtype=dtype, kernels="auto", kernel_library=kernel, no_kernel=missing,
        threads=threads, **changes,
    )  # fmt: skip
    return start_engine(config, StatusPage.create(), [], time.perf_counter())


def request(request_id: int, prompt: list[int], max_tokens: int) -> EngineRequest:
    """A greedy one that no token ends."""
    return EngineRequest(
        request_id, tuple(prompt), SamplingParams(temperature=0.0), StoppingParams(max_tokens),
        arrival=time.monotonic(),
    )  # fmt: skip


def generate(core: EngineCore, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
    """All at once, stepped to their ends."""
    traces: list[dict[str, list[Any]]] = [{"arrivals": [], "token_ids": []} for _ in prompts]
    started = time.perf_counter()
    for number, (prompt, wanted) in enumerate(zip(prompts, max_tokens, strict=True)):
        core.add(request(number, prompt, wanted))
    while core.has_work:
        message = core.step()
        now = time.perf_counter() - started
        for output in message.outputs if message is not None else ():
            if output.error:
                raise RuntimeError(output.error)
            if output.token_ids:
                traces[output.request_id]["arrivals"].append([now, len(output.token_ids)])
                traces[output.request_id]["token_ids"] += output.token_ids
    return {"wall": time.perf_counter() - started, "traces": traces}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quantization", default="none")
    args = parser.parse_args()
    answers = protocol_stream()
    core, ready = start(
        args.checkpoint, dtype=args.dtype, threads=args.threads, quantization=args.quantization
    )
    about = {"kernels": ready.kernels, "token_budget": ready.max_num_batched_tokens}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = generate(core, question["prompts"], question["max_tokens"])
        except Exception as error:  # the table says it, and the other points go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
