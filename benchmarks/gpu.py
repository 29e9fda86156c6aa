"""Measures the engine in process on a GPU: `make bench-gpu`, or `python benchmarks/gpu.py` anywhere.

Needs torch 2.11 or later, numpy, tokenizers and safetensors, and nothing else: no server, no network, no
checkpoint (random weights of published shapes). First whether it is right, then how fast. Ends within
`--minutes`; what there was no time for is said. The table is printed last, and only what was measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("protos", "client", "model", "server"))]

import torch  # noqa: E402

from benchmarks.gpu_engine import (  # noqa: E402
    SHAPES,
    Engine,
    free_bytes,
    percentile,
    random_model,
    weight_bytes,
)
from salver.model.attention import AttentionBatch  # noqa: E402
from salver.model.attention.reference import ReferenceAttention  # noqa: E402
from salver.model.cache import KVCache  # noqa: E402
from salver.model.transformer import Transformer  # noqa: E402

Row = tuple[str, str, str]  # what, figure, bar


class Run:
    """The rows that are there, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.smoke: bool = args.smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if self.smoke:
            torch.set_num_threads(1)  # what is so small only waits for others
        self.end = time.monotonic() + args.minutes * 60
        self.rows: list[Row] = []
        self.bandwidth = self.matmul = 0.0
        self.failed = False

    def row(self, what: str, figure: str, bar: str = "") -> None:
        self.rows.append((what, figure, bar))
        print(f"{what}: {figure}{f' (bar {bar})' if bar else ''}", flush=True)

    def part(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """Runs a part that takes about so long, if there is time; one that fails is a row too."""
        if time.monotonic() + (0 if self.smoke else seconds) > self.end:
            self.row(name, "not run: no time was left")
            return
        begin = time.monotonic()
        try:
            work()
        except Exception as error:  # the others shall still be measured
            self.failed = True
            self.row(name, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  [{name}: {time.monotonic() - begin:.0f} s]", flush=True)

    def model(self, shape: str, numerics: str) -> Transformer:
        return random_model(SHAPES["tiny" if self.smoke else shape], self.device, self.dtype, numerics)

    def engine(self, model: Transformer, numerics: str, **options: int | bool) -> Engine:
        if self.smoke:
            options = {"max_num_seqs": 8, "max_model_len": 96, "budget": 64} | {
                name: value for name, value in options.items() if isinstance(value, bool)
            }
        return Engine(model, exact=numerics == "exact", cache_bytes=free_bytes(self.device), **options)

    def prompt(self, length: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(1, 250 if self.smoke else 100_000), k=length)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def best_of(run: Run, work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest."""
    found = []
    for _ in range(times + 1):
        run.sync()
        begin = time.perf_counter()
        work()
        run.sync()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


@torch.inference_mode()
def correctness(run: Run) -> None:
    """A small model of the published kind in float32, by the definition of attention, and the served path."""
    from dataclasses import replace

    spec = replace(SHAPES["tiny" if run.smoke else "0.6B"], num_layers=2)
    lengths = [5, 40] if run.smoke else [700, 300, 33]
    reference = random_model(spec, run.device, torch.float32, "exact")
    expected = last_logits(run, reference, lengths, ReferenceAttention())
    served = random_model(spec, run.device, run.dtype, "exact")
    for ours, theirs in zip(served.parameters(), reference.parameters(), strict=True):
        ours.copy_(theirs)
    found = last_logits(run, served, lengths, served.attention)
    error = float((found - expected).norm() / expected.norm())
    limit = 0.03 if run.dtype == torch.bfloat16 else 1e-4
    run.row("logits against float32 (relative error)", f"{error:.2g}", f"< {limit:g}")
    run.failed |= not error < limit

    prompts = [run.prompt(length, length) for length in (3, 9, 30, 17) * (1 if run.smoke else 4)]
    answers, count = {}, 5 if run.smoke else 20
    for name, options in (
        ("alone", {}), ("crowd", {}), ("no graphs", {"graphs": False}), ("no overlap", {"overlapped": False}),
    ):  # fmt: skip
        engine = run.engine(served, "exact", max_num_seqs=32, max_model_len=256, budget=512, **options)
        groups = [[prompt] for prompt in prompts] if name == "alone" else [prompts]
        answers[name] = []
        for group in groups:
            begin = prompts.index(group[0])
            requests = [engine.request(p, count, i % 2) for i, p in enumerate(group, begin)]
            done = engine.run(requests)
            answers[name] += [done.tokens[request.request_id] for request in requests]
    for name in ("alone", "no graphs", "no overlap"):
        same = sum(a == b for a, b in zip(answers[name], answers["crowd"], strict=True))
        run.row(f"equal tokens, {name} and in a crowd", f"{same} of {len(prompts)}", f"{len(prompts)}")
        run.failed |= same != len(prompts)


def last_logits(run: Run, model: Transformer, lengths: list[int], attention: object) -> torch.Tensor:
    """float32, of prompts of these lengths in one step."""
    kept, model.attention = model.attention, attention  # type: ignore[assignment]
    size = 256
    needed = [-(-length // size) for length in lengths]
    cache = KVCache(model.spec, 1 + sum(needed), size, dtype=model.dtype, device=run.device)
    tables, slots, tokens, positions, bounds, first = [], [], [], [], [0], 1
    for length, count in zip(lengths, needed, strict=True):
        blocks = list(range(first, first + count))
        first += count
        tables.append(blocks + [0] * (max(needed) - count))
        slots += [blocks[p // size] * size + p % size for p in range(length)]
        tokens += run.prompt(length, length)
        positions += range(length)
        bounds.append(len(tokens))
    where = {"device": run.device}
    batch = AttentionBatch(bounds, lengths, torch.tensor(tables, **where), torch.tensor(slots, **where))
    hidden = model(torch.tensor(tokens, **where), torch.tensor(positions, **where), cache, batch)
    model.attention = kept
    return model.logits(hidden[[bound - 1 for bound in bounds[1:]]]).float()


@torch.inference_mode()
def roofline(run: Run) -> None:
    count, size = (1 << 20, 128) if run.smoke else (2 << 30, 8192)
    source = torch.ones(count, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    run.bandwidth = 2 * count / best_of(run, lambda: target.copy_(source))
    left = torch.randn((size, size), device=run.device).to(run.dtype)
    run.matmul = 2 * size**3 / best_of(run, lambda: left @ left)
    run.row("memory bandwidth (a copy)", f"{run.bandwidth / 1e9:.0f} GB/s")
    run.row(f"matrix products ({str(run.dtype)[6:]})", f"{run.matmul / 1e12:.1f} TFLOP/s")


def one_stream(run: Run, shape: str, numerics: str) -> None:
    model = run.model(shape, numerics)
    engine = run.engine(model, numerics, max_num_seqs=8, max_model_len=1024)
    count = 6 if run.smoke else 200
    engine.run([engine.request(run.prompt(16, 0), 8)])  # captures
    done = engine.run([engine.request(run.prompt(16, 1), count)])
    times = next(iter(done.times.values()))
    rate = (len(times) - 1) / (times[-1] - times[0])
    share = rate * weight_bytes(model) / run.bandwidth
    bar = "70%" if shape == "8B" and numerics == "fast" else ""
    run.row(f"one stream, {shape} {numerics}", f"{rate:.0f} tokens/s, {share:.0%} of bandwidth", bar)


def saturated(run: Run, numerics: str) -> None:
    """256 sequences of 100 to 1024 tokens in and out: the workload that nano-vllm and mini-sglang publish."""
    model = run.model("0.6B", numerics)
    engine = run.engine(model, numerics)
    rng = random.Random(0)
    low, high, count = (3, 8, 6) if run.smoke else (100, 1024, 256)
    sizes = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]
    engine.run([engine.request(run.prompt(low, 0), 4)])
    done = engine.run([engine.request(run.prompt(a, i), b, 0.6) for i, (a, b) in enumerate(sizes)])
    out = sum(map(len, done.tokens.values()))
    run.row(f"saturated, 0.6B {numerics}", f"{out / done.seconds:.0f} output tokens/s")
    run.row(f"outside the model, 0.6B {numerics}", f"{done.outside:.1%} of a step", "5%")


def prefill(run: Run, numerics: str) -> None:
    model = run.model("8B", numerics)
    length = 64 if run.smoke else 8192
    engine = run.engine(model, numerics, max_num_seqs=8, max_model_len=8448)
    if run.smoke:
        engine.run([engine.request(run.prompt(length, 0), 1)])
    seconds = min(engine.run([engine.request(run.prompt(length, i), 1)]).seconds for i in range(3))
    spec = model.spec
    products = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    attention = 2 * length * spec.num_heads * spec.head_dim * spec.num_layers  # causal: half of all pairs
    share = length * (2 * products + attention) / seconds / run.matmul
    bar = "60%" if numerics == "fast" else ""
    run.row(f"prefill, 8B {numerics}", f"{length / seconds:.0f} tokens/s, {share:.0%} of products", bar)


def arriving(run: Run) -> None:
    """Gaps between tokens of 32 streams while prompts of 16k tokens arrive."""
    model = run.model("8B", "fast")
    long, streams, count = (40, 4, 8) if run.smoke else (16384, 32, 400)
    budget = 512  # what a server with tokens_for_one of 170 takes beside streams
    engine = run.engine(model, "fast", max_num_seqs=40, max_model_len=16640, budget=budget)
    short = [engine.request(run.prompt(20 if run.smoke else 200, i), count) for i in range(streams)]
    later = [(1.0 + 2 * i, engine.request(run.prompt(long, 99 + i), 2)) for i in range(0 if run.smoke else 3)]
    done = engine.run(short, later)
    gaps = [
        after - before
        for request in short
        for before, after in zip(
            done.times[request.request_id], done.times[request.request_id][1:], strict=False
        )
    ]
    figure = f"p50 {percentile(gaps, 0.5) * 1e3:.1f} ms, p99 {percentile(gaps, 0.99) * 1e3:.1f} ms"
    run.row("gap between tokens, 8B, prompts of 16k arrive", figure)


def peers(run: Run) -> None:
    """transformers with the same shape and random weights, one stream; where it is installed."""
    if importlib.util.find_spec("transformers") is None:
        run.row("transformers, one stream", "not installed here")
        return
    import transformers

    spec = SHAPES["tiny" if run.smoke else "1B"]
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size, tie_word_embeddings=spec.tied_head,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(run.device, run.dtype).eval()
    ids = torch.ones((1, 16), dtype=torch.int64, device=run.device)
    count = 8 if run.smoke else 100
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        seconds = best_of(run, lambda: model.generate(ids, **options), 1)
    run.row("transformers, one stream, 1B", f"{count / seconds:.0f} tokens/s")


def table(rows: list[Row]) -> str:
    headed = [("what", "measured", "bar"), *rows]
    widths = [max(len(row[i]) for row in headed) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in headed)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.5, help="end within so many")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it run?")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    run = Run(parser.parse_args(argv))
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
    if run.device.type != "cuda" and not run.smoke:
        print("no GPU here: nothing is measured (--smoke tries whether it runs)", file=sys.stderr)
        return 2
    print(f"{time.strftime('%Y-%m-%d')} {name}, torch {torch.__version__}", flush=True)
    run.part("correctness", 40, lambda: correctness(run))
    run.part("roofline", 5, lambda: roofline(run))
    for shape in ("8B", "1B", "0.6B"):
        run.part(f"one stream, {shape} fast", 25, lambda shape=shape: one_stream(run, shape, "fast"))
    run.part("saturated, 0.6B fast", 60, lambda: saturated(run, "fast"))
    run.part("prefill, 8B fast", 25, lambda: prefill(run, "fast"))
    run.part("arriving prompts", 40, lambda: arriving(run))
    run.part("one stream, 8B exact", 25, lambda: one_stream(run, "8B", "exact"))
    run.part("saturated, 0.6B exact", 80, lambda: saturated(run, "exact"))
    run.part("prefill, 8B exact", 25, lambda: prefill(run, "exact"))
    run.part("transformers", 40, lambda: peers(run))
    if run.args.json is not None:
        run.args.json.write_text(json.dumps({"device": name, "rows": run.rows}, indent=1))
    print()
    print(table(run.rows))
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
