"""sentence-transformers or ONNX Runtime in a process of its own, in its own environment.

One JSON line in, one out. In: calls, each a list of texts that are encoded together. Out: the wall time of
all of them, one after the other, and the vectors of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Encode = Callable[[list[str]], Any]


def sentence_transformers(checkpoint: Path, threads: int) -> tuple[Encode, str]:
    import sentence_transformers as library

    torch.set_num_threads(threads)
    model = library.SentenceTransformer(str(checkpoint), device="cpu")
    model.eval()

    def encode(texts: list[str]) -> Any:
        # All texts of a call in one batch, as a server would have it.
        return model.encode(texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False)

    return encode, f"sentence-transformers {library.__version__}, torch {torch.__version__}"


def export(checkpoint: Path, onnx: Path) -> None:
    """The encoder without its pooling."""
    from transformers import AutoModel

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager"
            )

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

    ids = torch.ones((2, 7), dtype=torch.int64)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "length"} for name in [*names, "hidden"]}
    part = onnx.with_suffix(".part")
    torch.onnx.export(
        Body().eval(), (ids, ids, ids), str(part), input_names=names, output_names=["hidden"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    part.replace(onnx)


def onnxruntime(checkpoint: Path, onnx: Path, threads: int) -> tuple[Encode, str]:
    import onnxruntime as library
    from tokenizers import Tokenizer

    if not onnx.exists():
        export(checkpoint, onnx)
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()

    def encode(texts: list[str]) -> Any:
        found = tokenizer.encode_batch(texts)
        mask = np.array([one.attention_mask for one in found], dtype=np.int64)
        inputs = {
            "input_ids": np.array([one.ids for one in found], dtype=np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        (hidden,) = session.run(["hidden"], inputs)
        kept = mask[:, :, None].astype(np.float32)
        pooled = (hidden * kept).sum(1) / kept.sum(1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    return encode, f"onnxruntime {library.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("sentence-transformers", "onnxruntime"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--onnx", type=Path, required=True, help="where the exported model lies, or will")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of any library go to standard error
    if args.way == "onnxruntime":
        encode, said = onnxruntime(args.checkpoint, args.onnx, args.threads)
    else:
        encode, said = sentence_transformers(args.checkpoint, args.threads)
    print(json.dumps({"version": said}), file=answers, flush=True)
    for line in sys.stdin:
        calls = json.loads(line)["calls"]
        begin = time.perf_counter()
        vectors = [encode(texts) for texts in calls]
        wall = time.perf_counter() - begin
        print(
            json.dumps({"wall": wall, "vectors": np.asarray(vectors[0]).tolist()}), file=answers, flush=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
