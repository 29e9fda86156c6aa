"""What a precision costs in quality: perplexity, and top-1 agreement with float32, on real text.

The text is the language reference that comes with Python (`pydoc_data`), or `--text`. In process,
through the engine, with the native kernel.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

from benchmarks import machine
from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from benchmarks.figures import BenchError
from salver.model.cache import KVCache
from salver.model.kernels.build import find_or_build
from salver.model.kernels.library import Library, Precision
from salver.model.kernels.program import NativeTransformer
from salver.model.loader import load_model
from salver.model.tokenizer import Tokenizer
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.request import EngineRequest, Logprobs, SamplingParams, StoppingParams
from salver.server.engine.runner import ModelRunner

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 512
"""Tokens of a piece of the text; each is scored from its second token on, with what came before it."""
CPU = torch.device("cpu")
MODES = tuple(precision.name.lower() for precision in Precision)


def python_reference() -> str:
    """The language reference of this Python, some 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def runner_of(checkpoint: Path, mode: str, threads: int, blocks: int) -> ModelRunner:
    torch.set_num_threads(threads)
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    weights = torch.float32 if mode == "int4" else dtype
    model = load_model(checkpoint, device=CPU, dtype=weights, numerics="exact")
    cache = KVCache(model.spec, blocks, 16, dtype=dtype, device=CPU)
    library = Library(find_or_build(default_cache_dir()))
    native = NativeTransformer(model, cache, library, precision=Precision[mode.upper()], threads=threads)
    return ModelRunner(native, cache, block_size=16, row_multiple=1)


def score(runner: ModelRunner, pieces: list[tuple[int, ...]]) -> list[Logprobs]:
    """The log-probability of each token after the first of a piece, and the most probable one there."""
    blocks = runner.cache.num_blocks
    limits = EngineLimits(
        num_blocks=blocks, block_size=16, max_model_len=WINDOW, max_num_seqs=1,
        max_num_batched_tokens=WINDOW, enable_prefix_caching=False,
    )  # fmt: skip
    core = EngineCore(runner, limits, clock=time.monotonic)
    told: list[Logprobs] = []
    for number, piece in enumerate(pieces):
        core.add(EngineRequest(number, piece, SamplingParams(), StoppingParams(0), prompt_top_k=1))
        while core.has_work:
            message = core.step()
            for output in message.outputs if message is not None else ():
                if output.error:
                    raise BenchError(output.error)
                told += output.prompt_logprobs or []
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a UTF-8 file in the place of Python's reference")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument(
        "--modes", default=MODES, type=lambda text: tuple(text.split(",")), help=f"of {MODES}"
    )
    parser.add_argument("--threads", type=int, default=machine.cores())
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else python_reference()
    name = args.text or f"Python {platform.python_version()}'s reference"
    cache_dir = default_cache_dir()
    checkpoint = checkpoint_of(args.model, "float32", cache_dir)
    ids = Tokenizer.from_directory(checkpoint).encode(text)[: args.tokens]
    pieces = [tuple(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]
    about = machine.header(ROOT)
    print(f"{about['cpu']}; commit {about['commit']}, {about['date']}; {len(ids)} tokens of {name}\n")
    print(
        "| precision | perplexity | over float32's | same most probable token as float32 |\n|---|---|---|---|"
    )
    truth: list[Logprobs] = []
    for mode in ("float32", *(mode for mode in args.modes if mode != "float32")):
        told = score(runner_of(checkpoint, mode, args.threads, WINDOW // 16 + 1), pieces)
        truth = truth or told
        perplexity, least = (math.exp(-sum(x.logprob for x in of) / len(of)) for of in (told, truth))
        same = sum(a.top[0][0] == b.top[0][0] for a, b in zip(told, truth, strict=True)) / len(told)
        print(f"| {mode} | {perplexity:.3f} | {perplexity / least:.4f} | {100 * same:.2f} % |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
