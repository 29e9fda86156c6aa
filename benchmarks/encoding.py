"""Embeddings of MiniLM through gRPC, beside sentence-transformers and ONNX Runtime in process.

All compute in float32 with the same number of threads, texts of the same kind, 16 a request, and take turns
in one run. The others have no clients: their requests come one after the other, without a network, which is
the best they can have. Ours come from 8 or 64 clients at once, each with its next request as soon as it has
the last answer; the clients share the cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import grpc

from benchmarks import machine
from benchmarks.checkpoint import default_cache_dir
from benchmarks.figures import BenchError, percentile
from benchmarks.peers.peer import TORCH, make_environment, once
from benchmarks.processes import InProcess, Server
from salver.server import catalog
from salver.v1 import common_pb2, encoding_pb2, encoding_pb2_grpc

_Stub: Any = encoding_pb2_grpc.EncodingServiceStub
ROOT = Path(__file__).resolve().parent.parent
PEERS = ("sentence-transformers", "onnxruntime")
VERSIONS = (
    *("sentence-transformers==6.2.0", "transformers==5.24.0", "onnxruntime==1.32.0", "onnx==1.23.2"),
    "onnxscript==0.7.2",
)
BATCH = 16  # texts of a request
# Each is one token of MiniLM's vocabulary, so that lengths are what they are meant to be.
WORDS = (
    "the market city river house school music water power light world family history court money paper "
    "table garden winter summer morning evening doctor teacher letter number village bridge engine station"
).split()
SPECIAL = 2  # tokens around a text
# The bars of requests of 16 texts: of sentence-transformers' texts a second, and of ONNX Runtime's.
BARS = {"equal": (1.0, 1.0), "mixed": (1.5, 1.0)}


@dataclass(frozen=True, slots=True)
class Load:
    """Texts of one kind, in requests."""

    kind: str  # "equal" or "mixed"
    calls: list[list[str]]
    num_tokens: int

    @property
    def texts(self) -> int:
        return sum(map(len, self.calls))


def make_load(kind: str, num_calls: int, seed: int) -> Load:
    """Equal lengths are 64 tokens; mixed ones are 8 to 128, drawn evenly by their logarithm."""
    draw = random.Random(f"{kind} {seed}")
    calls: list[list[str]] = []
    num_tokens = 0
    for _ in range(num_calls):
        lengths = [
            64 if kind == "equal" else round(math.exp(draw.uniform(math.log(8), math.log(128))))
            for _ in range(BATCH)
        ]
        calls.append([" ".join(draw.choices(WORDS, k=length - SPECIAL)) for length in lengths])
        num_tokens += sum(lengths)
    return Load(kind, calls, num_tokens)


def request_of(texts: Sequence[str]) -> Any:
    return encoding_pb2.EmbedRequest(inputs=[common_pb2.Prompt(text=text) for text in texts])


async def _embed_all(address: str, calls: Sequence[Sequence[str]], clients: int) -> tuple[float, list[Any]]:
    """Wall time and replies; each client has a connection of its own."""
    waiting = list(enumerate(map(request_of, calls)))[::-1]
    replies: list[Any] = [None] * len(calls)
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(clients)
    ]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))

        async def client(channel: grpc.aio.Channel) -> None:
            embed = _Stub(channel).Embed
            while waiting:
                index, request = waiting.pop()
                replies[index] = await embed(request, timeout=300)

        begin = time.perf_counter()
        await asyncio.gather(*map(client, channels))
        return time.perf_counter() - begin, replies
    except grpc.aio.AioRpcError as error:
        raise BenchError(f"{error.code().name}: {error.details()}") from error
    finally:
        for channel in channels:
            await channel.close()


def embed_all(server: Server, load: Load, clients: int) -> tuple[float, list[Any]]:
    """Texts a second, and the replies. Raises BenchError where the texts are not as long as meant."""
    wall, replies = asyncio.run(_embed_all(server.address, load.calls, clients))
    tokens = sum(reply.usage.prompt_tokens for reply in replies)
    if tokens != load.num_tokens:
        raise BenchError(f"{load.kind}: {tokens} tokens, not {load.num_tokens}")
    return load.texts / wall, replies


async def _alone(address: str, texts: Sequence[str]) -> list[tuple[float, float, float]]:
    """Of each text, sent alone: seconds for the caller, those in which it was computed, and those before.

    The last are from its arrival to its step's begin, tokenization included: what batching adds is in them.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        embed = _Stub(channel).Embed
        found = []
        for text in texts:
            request = request_of([text])
            begin = time.perf_counter()
            reply = await embed(request, timeout=60)
            wall = time.perf_counter() - begin
            computing, before = reply.timings.prefill.ToNanoseconds(), reply.timings.queue.ToNanoseconds()
            found.append((wall, computing / 1e9, before / 1e9))
        return found


def check_same(ours: Any, theirs: Sequence[Sequence[float]], name: str) -> None:
    """Raises BenchError unless both gave the same vectors."""
    worst = max(
        abs(a - b)
        for one, other in zip(ours.embeddings, theirs, strict=True)
        for a, b in zip(one.values, other, strict=True)
    )
    if worst > 1e-4:
        raise BenchError(f"{name}: its vectors differ from ours by {worst:.2g}")


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Figures by name, one for each repeat. Raises BenchError."""
    cache_dir = default_cache_dir()
    checkpoint = catalog.fetch("minilm", cache_dir)
    home = ROOT / ".peers" / "encoding"
    versions = "-".join(VERSIONS).replace("==", "")

    def install(log: Path) -> None:
        make_environment(home, log, [TORCH], VERSIONS)

    once(home, f"install-{versions}", install)
    python = home / "venv" / "bin" / "python"
    script = Path(__file__).with_name("peers") / "embedding_child.py"
    command = [str(checkpoint), "--onnx", str(home / "minilm.onnx"), "--threads", str(args.threads)]
    figures: dict[str, list[float]] = {}
    peers: dict[str, InProcess] = {}
    extra = ["--cache-dir", str(cache_dir), *args.serve_arg]
    with Server("minilm", dtype=args.dtype, threads=args.threads, extra=extra) as server:
        server.start()
        try:
            for name in args.peers:
                # -P: this folder holds modules named like the packages that the script imports.
                peers[name] = InProcess([str(python), "-P", str(script), name, *command], what=name)
                print(f"{peers[name].about['version']}", file=sys.stderr)
            for repeat in range(-1, args.repeats):  # the first is a warm-up
                found = _one_repeat(args, server, peers, repeat)
                said = ", ".join(f"{name} {figure:.1f}" for name, figure in found.items())
                print(f"repeat {repeat + 1 or 'of the warm-up'}: {said}", file=sys.stderr)
                if repeat >= 0:
                    for name, figure in found.items():
                        figures.setdefault(name, []).append(figure)
        finally:
            for peer in peers.values():
                peer.stop()
    return figures


def _one_repeat(
    args: argparse.Namespace, server: Server, peers: dict[str, InProcess], repeat: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    num_calls = args.calls if repeat >= 0 else 4
    for kind in BARS:
        load, crowd = make_load(kind, num_calls, repeat), make_load(kind, 4 * num_calls, repeat)
        found[f"{kind} 8"], replies = embed_all(server, load, 8)
        found[f"{kind} 64"], _ = embed_all(server, crowd, 64)
        for name, peer in peers.items():
            answer = peer.ask({"calls": load.calls})
            if args.dtype == "float32":
                check_same(replies[0], answer["vectors"], name)
            found[f"{kind} {name}"] = load.texts / answer["wall"]
    load = make_load("equal", num_calls, repeat)
    lone = Load("lone", [[text] for call in load.calls for text in call], load.num_tokens)
    found["lone 64"], _ = embed_all(server, lone, 64)
    alone = asyncio.run(_alone(server.address, [call[0] for call in lone.calls[:100]]))
    found["alone ms"] = 1000 * percentile([seconds for seconds, _, _ in alone], 50)
    found["beside computing ms"] = 1000 * percentile([seconds - own for seconds, own, _ in alone], 50)
    found["queue ms"] = 1000 * percentile([queue for _, _, queue in alone], 50)
    return found


def main() -> int:
    """1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--peers", default=",".join(PEERS), type=lambda text: text.split(",") if text else [])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", type=int, default=32, help="of 8 clients; 64 make four times as many")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--serve-arg", action="append", default=[])
    args = parser.parse_args()
    try:
        figures = measure(args)
    except (BenchError, catalog.CatalogError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    about = machine.header(ROOT)
    print(
        f"{about['cpu']}, {about['cores']} cores; commit {about['commit']}, {about['date']}; {args.dtype}, "
        f"medians of {args.repeats}; texts a second, requests of {BATCH} texts\n"
    )
    print("| lengths | clients | Salver | " + " | ".join(f"{name} | ratio" for name in args.peers) + " |")
    print("|---|---|---|" + "---|---|" * len(args.peers))
    missed = False
    for kind, bars in BARS.items():
        for clients in (8, 64):
            ours = figures[f"{kind} {clients}"]
            row = [kind, str(clients), f"{statistics.median(ours):.0f}"]
            for name in args.peers:
                theirs = figures[f"{kind} {name}"]
                ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                missed = missed or ratio < bars[PEERS.index(name)]
                row += [f"{statistics.median(theirs):.0f}", f"{ratio:.2f}"]
            print("| " + " | ".join(row) + " |")
    of = {name: statistics.median(values) for name, values in figures.items()}
    print(f"\nlone texts of 64 tokens from 64 clients: {of['lone 64']:.0f} a second")
    print(
        f"a lone request of one such text: {of['alone ms']:.2f} ms, of which "
        f"{of['beside computing ms']:.2f} ms are not computing: {of['queue ms']:.2f} ms from its arrival to "
        "its step's begin, tokenization included, and the rest"
    )
    return int(missed or of["queue ms"] > 2)


if __name__ == "__main__":
    raise SystemExit(main())
