"""OpenVINO GenAI in a process of its own, in its own environment: speaks as benchmarks/baseline.py does."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

# Large steps for prompts; a cache that holds every request of the benchmark at once.
MAX_NUM_BATCHED_TOKENS = 2048
CACHE_GIB = 2


def config(max_tokens: int) -> Any:
    """Greedy, of exactly this length."""
    wanted = genai.GenerationConfig()
    wanted.max_new_tokens = max_tokens
    wanted.min_new_tokens = max_tokens
    wanted.ignore_eos = True
    wanted.do_sample = False
    return wanted


def generate(pipe: Any, prompts: list[list[int]], max_tokens: list[int], at: list[float]) -> dict[str, Any]:
    """Adds each request at its time, and steps while any is unfinished."""
    tensors = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: at[index], reverse=True)
    traces: list[dict[str, Any]] = [{"arrivals": [], "token_ids": []} for _ in prompts]
    handles: dict[int, Any] = {}
    started = time.perf_counter()
    while waiting or pipe.has_non_finished_requests():
        now = time.perf_counter() - started
        while waiting and at[waiting[-1]] <= now:
            index = waiting.pop()
            handles[index] = pipe.add_request(index, tensors[index], config(max_tokens[index]))
        if not pipe.has_non_finished_requests():
            time.sleep(max(0.0, at[waiting[-1]] - now))
            continue
        pipe.step()
        now = time.perf_counter() - started
        for index, handle in handles.items():
            new: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    new.extend(output.generated_ids)
            if new:
                traces[index]["arrivals"].append([now, len(new)])
                traces[index]["token_ids"].extend(new)
    return {"wall": time.perf_counter() - started, "traces": traces}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of any library go to standard error
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": args.threads}
    pipe = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
    settings = f"{properties}; cache {CACHE_GIB} GiB, {MAX_NUM_BATCHED_TOKENS} tokens a step"
    print(json.dumps({"version": genai.__version__, "settings": settings}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = generate(pipe, question["prompts"], question["max_tokens"], question["at"])
        except Exception as error:  # the row of the table says it, and the other points go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
