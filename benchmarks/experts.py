"""What a mixture of experts costs: a step of one stream, by the number of experts that its token uses.

    python -m benchmarks.experts [--count 64] [--per-token 1 2 4 8 16 32 64]

Random weights of OLMoE's shape, smaller; the same checkpoint, of which config.json alone says how many
experts a token uses. Each line is an engine in a process of its own. A step is a part that is always the same
and one in proportion to the experts; the last column is the second by what the first and last line say of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

HIDDEN, INNER, LAYERS, VOCAB = 1024, 512, 2, 4096
PROMPT, STEPS = 32, 60


def write(directory: Path, count: int) -> None:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=512, num_experts=count,
        num_experts_per_tok=1,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(directory)


def step_ms(checkpoint: Path, threads: int) -> float:
    """The median step of one stream."""
    from benchmarks.inline_engine import request, start

    core, _ = start(
        checkpoint, dtype="float32", threads=threads, max_num_seqs=1, kv_cache_memory=1 << 26,
        enable_prefix_caching=False,
    )  # fmt: skip
    core.add(request(0, list(range(5, 5 + PROMPT)), STEPS))
    times = []
    while core.has_work:
        begin = time.perf_counter()
        message = core.step()
        if message is not None and message.stats is not None and not message.stats.num_prefill_tokens:
            times.append(1e3 * (time.perf_counter() - begin))
    if len(times) < STEPS // 2:
        raise SystemExit(f"only {len(times)} steps were timed")
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64, help="experts of a layer")
    parser.add_argument("--per-token", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(step_ms(args.child, args.threads))
        return 0
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory)
        write(checkpoint, args.count)
        config = json.loads((checkpoint / "config.json").read_text())
        for used in args.per_token:
            (checkpoint / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": used}))
            command = [sys.executable, __file__, "--child", str(checkpoint), "--threads", str(args.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[used] = float(done.stdout.splitlines()[-1])
    size = 3 * HIDDEN * INNER * 4 / 1e6
    print(f"{LAYERS} layers of {args.count} experts, {size:.1f} MB each (float32), {args.threads} threads\n")
    print("| experts a token uses | step, ms | of a line through the first and the last |\n|---|---|---|")
    first, last = min(found), max(found)
    slope = (found[last] - found[first]) / (last - first) if last > first else 0.0
    for used, ms in found.items():
        expected = found[first] + slope * (used - first)
        print(f"| {used} of {args.count} | {ms:.2f} | {ms / expected:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
