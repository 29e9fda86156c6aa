"""The baseline, in a process of its own: `transformers.generate` on static, left-padded batches.

Reads one JSON object a line from standard input: {"prompts": [[id]], "max_tokens": [int], "at": [s]}. Answers
each with one line ({"wall": s, "traces": [{"arrivals": [[s, n]], "token_ids": [id]}]}, or {"error": why}).
The first line it writes says that the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

PADDING_ID = 0  # masked everywhere, so any id serves


class ArrivalTimes(BaseStreamer):
    """Notes when each step's tokens are on the host. `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt:
            self.times.append(time.perf_counter())
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing to flush."""


def generate(model: Any, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
    """One static batch: it runs until the longest answer is done; each request keeps the tokens it wanted."""
    longest = max(len(prompt) for prompt in prompts)
    streamer = ArrivalTimes()
    started = time.perf_counter()
    rows = [[PADDING_ID] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max(max_tokens),
            do_sample=False,
            use_cache=True,
            streamer=streamer,
        )
    new = output[:, longest:].tolist()
    wall = time.perf_counter() - started
    times = [moment - started for moment in streamer.times]
    return {
        "wall": wall,
        "traces": [
            {"arrivals": [[moment, 1] for moment in times[:wanted]], "token_ids": row[:wanted]}
            for row, wanted in zip(new, max_tokens, strict=True)
        ],
    }


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The checkpoint, with end-of-sequence ignored: every answer has the length that was asked for."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    model.eval()
    config = model.generation_config
    config.eos_token_id = None
    config.pad_token_id = PADDING_ID
    config.do_sample = False
    # Settings of sampling that a checkpoint may carry; greedy search would warn about each.
    config.temperature = config.top_p = config.top_k = None
    return model


def protocol_stream() -> TextIO:
    """The real standard output; prints of any library go to standard error instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = protocol_stream()
    torch.set_num_threads(args.threads)
    log: Any = transformers.utils.logging  # untyped
    log.set_verbosity_error()
    log.disable_progress_bar()
    started = time.perf_counter()
    model = load(args.checkpoint, getattr(torch, args.dtype))
    print(
        json.dumps(
            {
                "load_seconds": time.perf_counter() - started,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "attention": model.config._attn_implementation,
                "threads": torch.get_num_threads(),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            }
        ),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if any(request["at"]):
                raise ValueError("a static batch takes no requests that arrive later")
            answer = generate(model, request["prompts"], request["max_tokens"])
        except Exception as error:  # the row of the table says it, and the other points go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
