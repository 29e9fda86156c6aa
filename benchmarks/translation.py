"""Translation beside transformers and CTranslate2: random weights of Marian's and T5's shapes, greedy.

    python -m benchmarks.translation [--shape marian t5] [--batch 1 32] [--repeats 3]

Each in a process of its own, the same sources, exactly as many tokens out, float32 unless it says
otherwise. Salver is stepped in process, as the others are called. CTranslate2 is used where it is in
.peers/ctranslate2 (`pip install --no-deps --target .peers/ctranslate2 ctranslate2`), else left out,
and said so.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it is no package's module

CTRANSLATE2 = ROOT / ".peers" / "ctranslate2"
SOURCE_TOKENS, OUTPUT_TOKENS, THREADS = 32, 64, 2
# opus-mt-en-de and t5-small.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": (
        "MarianMTModel",
        {
            "vocab_size": 58101, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6,
            "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048, "activation_function": "swish", "scale_embedding": True,
            "max_position_embeddings": 512, "pad_token_id": 58100, "eos_token_id": 0,
            "decoder_start_token_id": 58100, "forced_eos_token_id": None,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
            "decoder_start_token_id": 0, "n_positions": 512,
        },
    ),
}  # fmt: skip
Translate = Callable[[list[list[int]]], int]  # sources to the number of tokens that came


def write(directory: Path, shape: str) -> None:
    """A random checkpoint; Marian's start token has no embedding, as in what is published."""
    import torch
    import transformers

    name, fields = SHAPES[shape]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**fields))
    if shape == "marian":
        with torch.no_grad():
            model.get_input_embeddings().weight[fields["pad_token_id"]] = 0
    model.save_pretrained(directory)


def sources_of(shape: str, count: int) -> list[list[int]]:
    draw = random.Random(0)
    size = SHAPES[shape][1]["vocab_size"]
    return [[draw.randrange(10, size - 10) for _ in range(SOURCE_TOKENS)] for _ in range(count)]


def salver(checkpoint: Path, batch: int, dtype: str = "float32", quantization: str = "none") -> Translate:
    from salver.model.kernels.build import KernelUnavailable, find_or_build
    from salver.server.catalog import default_cache_dir
    from salver.server.engine.config import EngineConfig
    from salver.server.engine.encoder_startup import start_any_engine
    from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
    from salver.server.engine.status_page import StatusPage

    try:
        library = str(find_or_build(default_cache_dir()))
    except KernelUnavailable as error:
        if quantization != "none":
            raise SystemExit(f"salver {quantization}: {error}") from error
        print(f"salver by torch: {error}", file=sys.stderr)
        library = ""
    config = EngineConfig(
        str(checkpoint), device="cpu", dtype=dtype, quantization=quantization, kernels="auto",
        kernel_library=library, threads=THREADS, enable_prefix_caching=False,
    )  # fmt: skip
    core, _ = start_any_engine(config, StatusPage.create(), [], time.perf_counter())
    (start,) = _output_start(checkpoint)
    numbers = iter(range(1, 1 << 30))

    def translate(sources: list[list[int]]) -> int:
        for source in sources:
            core.add(
                EngineRequest(
                    next(numbers),
                    (start,),
                    SamplingParams(temperature=0.0),
                    StoppingParams(OUTPUT_TOKENS),
                    source_token_ids=tuple(source),
                    num_start_tokens=1,
                )
            )
        before = core.generated_tokens
        while core.has_work:
            core.step()
        return core.generated_tokens - before

    return translate


def _output_start(checkpoint: Path) -> tuple[int, ...]:
    from salver.model.config_reader import read_spec

    return read_spec(checkpoint).output_start


def transformers_of(checkpoint: Path, batch: int, dtype: str = "float32") -> Translate:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def translate(sources: list[list[int]]) -> int:
        ids = torch.tensor(sources)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=1, do_sample=False,
            min_new_tokens=OUTPUT_TOKENS, max_new_tokens=OUTPUT_TOKENS,
        )  # fmt: skip
        return (found.shape[1] - 1) * len(sources)

    return translate


class _Vocabulary:
    """What CTranslate2's converter asks of a tokenizer."""

    eos_token, unk_token, pad_token, bos_token = "</s>", "<unk>", "<pad>", "<s>"

    def __init__(self, shape: str) -> None:
        fields = SHAPES[shape][1]
        self.tokens = [f"t{i}" for i in range(fields["vocab_size"])]
        ends = {"marian": {0: "</s>", 1: "<unk>", 58100: "<pad>"}, "t5": {0: "<pad>", 1: "</s>", 2: "<unk>"}}
        for index, token in ends[shape].items():
            self.tokens[index] = token

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.tokens[index]


def ctranslate2_of(checkpoint: Path, batch: int, compute: str = "float32") -> Translate:
    sys.path.insert(0, str(CTRANSLATE2))
    import ctranslate2  # type: ignore[import-not-found]
    import transformers
    from ctranslate2.converters.transformers import _MODEL_LOADERS  # type: ignore[import-not-found]

    shape = checkpoint.name
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    vocabulary = _Vocabulary(shape)
    spec = _MODEL_LOADERS[type(model.config).__name__](model, vocabulary)
    spec.validate()
    spec.optimize(quantization=None if compute == "float32" else compute)
    converted = checkpoint.parent / f"{shape}-{compute}"
    converted.mkdir(exist_ok=True)
    spec.save(str(converted))
    translator = ctranslate2.Translator(
        str(converted), device="cpu", compute_type=compute, intra_threads=THREADS, inter_threads=1
    )

    def translate(sources: list[list[int]]) -> int:
        found = translator.translate_batch(
            [[vocabulary.tokens[i] for i in source] for source in sources],
            beam_size=1, min_decoding_length=OUTPUT_TOKENS, max_decoding_length=OUTPUT_TOKENS,
        )  # fmt: skip
        return sum(len(result.hypotheses[0]) for result in found)

    return translate


ENGINES: dict[str, Callable[[Path, int], Translate]] = {
    "salver": salver,
    "salver-bf16": lambda checkpoint, batch: salver(checkpoint, batch, "bfloat16"),
    "salver-int8": lambda checkpoint, batch: salver(checkpoint, batch, "float32", "int8"),
    "transformers": transformers_of,
    "transformers-bf16": lambda checkpoint, batch: transformers_of(checkpoint, batch, "bfloat16"),
    "ctranslate2": ctranslate2_of,
    "ctranslate2-int8": lambda checkpoint, batch: ctranslate2_of(checkpoint, batch, "int8"),
}


def child(engine: str, checkpoint: Path, batches: list[int], repeats: int) -> None:
    """Prints, as JSON, the median of tokens a second for each batch."""
    found = {}
    translate = ENGINES[engine](checkpoint, max(batches))
    for batch in batches:
        sources = sources_of(checkpoint.name, batch)
        translate(sources)  # warm
        speeds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            tokens = translate(sources)
            if tokens != batch * OUTPUT_TOKENS:
                raise SystemExit(f"{engine} gave {tokens} tokens, not {batch * OUTPUT_TOKENS}")
            speeds.append(tokens / (time.perf_counter() - begin))
        found[batch] = statistics.median(speeds)
    print(json.dumps(found))


def ratio(speed: float, engine: str, measured: dict[str, dict[str, float]], batch: str) -> str:
    """To transformers in bfloat16 for what computes in it, in float32 for all others."""
    base = measured.get("transformers-bf16" if engine.endswith("bf16") else "transformers")
    return "" if base is None else f" ({speed / base[batch]:.2f}x)"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.batch, args.repeats)
        return 0
    work = f"{SOURCE_TOKENS} tokens in, {OUTPUT_TOKENS} out, greedy, {THREADS} threads"
    print(f"{work}: tokens/s (of transformers' in bfloat16 or float32)")
    with tempfile.TemporaryDirectory() as directory:
        for shape in args.shape:
            checkpoint = Path(directory) / shape
            write(checkpoint, shape)
            measured: dict[str, dict[str, float]] = {}
            for engine in args.engine:
                if engine.startswith("ctranslate2") and not CTRANSLATE2.is_dir():
                    print(f"{shape}: {engine} is not in {CTRANSLATE2}")
                    continue
                command = [sys.executable, __file__, "--child", engine, str(checkpoint)]
                command += ["--repeats", str(args.repeats), "--batch", *map(str, args.batch)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(f"{shape}: {engine} failed (exit status {done.returncode})")
                    continue
                measured[engine] = json.loads(done.stdout.splitlines()[-1])
            for batch in map(str, args.batch):
                shown = [
                    f"{engine} {of[batch]:.0f}" + ratio(of[batch], engine, measured, batch)
                    for engine, of in measured.items()
                ]
                print(f"{shape}, {batch} at once: " + ", ".join(shown), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
