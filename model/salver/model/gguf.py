"""Converts a Llama-shaped GGUF file to a Hugging Face checkpoint directory.

`python -m salver.model.gguf SOURCE DESTINATION --dtype float32` does it in a process of
its own, so that neither the server's front nor its worker pays the memory; normally
`salver.model.checkpoint` runs that and keeps the result. The output's bytes depend on the
source and the dtype alone. Tensor names and the order of q and k rows:
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError
from .gguf_reader import FloatArray, GGUFFile, TensorInfo
from .gguf_tokenizer import TokenizerFiles, read_tokenizer

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"  # of a converted directory: {"files": {name: {"size": bytes, "sha256": hex}}}

_T = TypeVar("_T")
_LAYER_TENSORS = {  # GGUF name in a block -> Hugging Face name in a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KNOWN_FIELDS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "vocab_size",
    }
)
# Llama 3.1's rope scaling is in GGUF only as the factors that it comes to; these are what made them.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes of a Llama-shaped model, read from the metadata."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor to write: its name, where it comes from, and the heads whose rows are permuted (or 0)."""

    name: str
    source: TensorInfo
    permuted_heads: int


def convert_gguf(
    source: Path, destination: Path, dtype: str, on_progress: Callable[[str], None] | None = None
) -> None:
    """Write the Hugging Face directory of the GGUF file `source` into the empty or new `destination`.

    `dtype` is that of every tensor written: float32, bfloat16 or float16. Files are synced to
    disk, the manifest last. Raises CheckpointError naming file and field, OSError when the disk fails.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} was expected")
    file = GGUFFile(source)
    metadata = _Metadata(file)
    shape = metadata.shape()
    context_length = metadata.get("context_length", int)
    tokenizer = read_tokenizer(file, context_length)
    if tokenizer.vocab_size != shape.vocab_size:
        raise CheckpointError(
            f"{source}: tokenizer.ggml.tokens has {tokenizer.vocab_size} tokens,"
            f" token_embd.weight {shape.vocab_size} rows"
        )
    outputs = _plan(file, shape)
    names = {output.name for output in outputs}
    config = metadata.config(shape, context_length, names, tokenizer, dtype)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(tokenizer.eos_token_ids) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    destination.mkdir(parents=True, exist_ok=True)
    directory = _Directory(destination)
    directory.write("config.json", [_json(config)])
    directory.write("generation_config.json", [_json({k: v for k, v in generation.items() if v is not None})])
    directory.write("tokenizer_config.json", [_json(tokenizer.tokenizer_config)])
    directory.write("tokenizer.json", [tokenizer.tokenizer_json.encode()])
    directory.write(WEIGHTS, _safetensors(file, outputs, dtype, on_progress or (lambda _: None)))
    directory.write(MANIFEST, [_json({"files": dict(sorted(directory.files.items()))})])
    directory.sync()


class _Metadata:
    """Typed reads of `llama.*` fields; what is not implemented is refused by name."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        architecture = file.fields.get("general.architecture")
        if architecture != "llama":
            raise self._fail(f"general.architecture is {architecture!r}; only 'llama' is implemented")
        if file.fields.get("split.count", 1) not in (0, 1):
            raise self._fail("split.count: a file in several parts is not implemented; merge it first")
        for name in file.fields:
            if name.startswith("llama.") and name.removeprefix("llama.") not in _KNOWN_FIELDS:
                raise self._fail(f"metadata field {name} is not implemented")

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {message}")

    def get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self._file.fields.get(f"llama.{name}", default)
        if value is None:
            raise self._fail(f"metadata field llama.{name} is missing")
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value <= 0)):  # type: ignore[operator]
            raise self._fail(f"llama.{name} is {value!r:.60}, not a positive {kind.__name__}")
        return value

    def shape(self) -> _Shape:
        hidden, heads = self.get("embedding_length", int), self.get("attention.head_count", int)
        kv_heads = self.get("attention.head_count_kv", int, heads)
        head_dim = self.get("attention.key_length", int, max(1, hidden // heads))
        for name in ("attention.value_length", "rope.dimension_count"):
            if self.get(name, int, head_dim) != head_dim:
                raise self._fail(f"llama.{name} differs from the head size {head_dim}; not implemented")
        if heads % kv_heads or head_dim % 2:
            raise self._fail(
                f"llama.attention.head_count {heads} and head_count_kv {kv_heads} with head size"
                f" {head_dim} do not make a model"
            )
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise self._fail("tensor token_embd.weight is missing")
        return _Shape(
            num_layers=self.get("block_count", int),
            hidden_size=hidden,
            intermediate_size=self.get("feed_forward_length", int),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
        )

    def config(
        self, shape: _Shape, context_length: int, names: set[str], tokenizer: TokenizerFiles, dtype: str
    ) -> dict[str, Any]:
        """config.json's content; numbers that GGUF rounded to float32 get their shortest spelling back."""
        scaling = self._rope_scaling(shape.head_dim)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer.bos_token_id,
            "dtype": dtype,
            "eos_token_id": list(tokenizer.eos_token_ids) or None,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": context_length,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
            "model_type": "llama",
            "num_attention_heads": shape.num_heads,
            "num_hidden_layers": shape.num_layers,
            "num_key_value_heads": shape.num_kv_heads,
            "pad_token_id": tokenizer.pad_token_id,
            "rms_norm_eps": _shortest(self.get("attention.layer_norm_rms_epsilon", float)),
            "rope_theta": _shortest(self.get("rope.freq_base", float, 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in names,
            "vocab_size": shape.vocab_size,
        }
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type", str, "none")
        factors = self._file.tensors.get("rope_freqs.weight")
        if kind == "linear" and factors is None:
            return {"factor": _shortest(self.get("rope.scaling.factor", float)), "rope_type": "linear"}
        if kind != "none":
            raise self._fail(f"llama.rope.scaling.type is {kind!r}, which is not implemented")
        if factors is None:
            return None
        stored = np.concatenate([chunk.reshape(-1) for chunk in self._file.rows(factors)])
        base = self.get("rope.freq_base", float, 10000.0)
        factor = float(stored.max())
        if stored.shape != (head_dim // 2,) or not np.allclose(
            stored, _llama3_factors(base, head_dim, factor), rtol=1e-4
        ):
            raise self._fail("tensor rope_freqs.weight is not that of Llama 3's scaling; not implemented")
        return {"factor": factor, "rope_type": "llama3", **_LLAMA3_ROPE}


def _llama3_factors(base: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3's scaling divides each rope frequency by, [head_dim / 2]."""
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    original = _LLAMA3_ROPE["original_max_position_embeddings"]
    wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1 - smooth) / factor + smooth))


def _shortest(value: float) -> float:
    """The float64 that prints as `value` prints in float32: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _plan(file: GGUFFile, shape: _Shape) -> list[_Output]:
    """Every tensor to write, sorted by name. Refuses missing, unknown and misshaped ones."""
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys, inner = shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_output": hidden}
    rows |= {"ffn_gate": inner, "ffn_up": inner, "ffn_down": hidden, "attn_norm": hidden, "ffn_norm": hidden}
    columns = {"attn_output": queries, "ffn_down": inner}
    wanted: dict[str, tuple[str, tuple[int, ...], int, bool]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (shape.vocab_size, hidden), 0, True),
        "output_norm.weight": ("model.norm.weight", (hidden,), 0, True),
        "output.weight": ("lm_head.weight", (shape.vocab_size, hidden), 0, False),
    }
    permuted = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads}
    for layer in range(shape.num_layers):
        for source, target in _LAYER_TENSORS.items():
            name, heads = f"model.layers.{layer}.{target}", permuted.get(source, 0)
            vector = (rows[source],)
            size: tuple[int, ...] = (
                vector if source.endswith("norm") else (rows[source], columns.get(source, hidden))
            )
            wanted[f"blk.{layer}.{source}.weight"] = (f"{name}.weight", size, heads, True)
            if not source.endswith("norm"):
                # One flag of config.json covers q, k, v, o (and one the three of the MLP), so a
                # bias is expected of all of them where the first layer's first has one.
                flag = "attn_q" if source.startswith("attn") else "ffn_gate"
                if f"blk.0.{flag}.bias" in file.tensors:
                    wanted[f"blk.{layer}.{source}.bias"] = (f"{name}.bias", vector, heads, True)
    outputs = []
    for source, (name, size, heads, required) in wanted.items():
        info = file.tensors.get(source)
        if info is None:
            if required:
                raise CheckpointError(f"{file.path}: tensor {source} is missing")
            continue
        if info.shape != size:
            raise CheckpointError(f"{file.path}: tensor {source} has shape {info.shape}, not {size}")
        outputs.append(_Output(name, info, heads))
    for source in file.tensors:
        if source not in wanted and source != "rope_freqs.weight":
            raise CheckpointError(f"{file.path}: tensor {source} is not one that this conversion knows")
    return sorted(outputs, key=lambda output: output.name)


def _safetensors(
    file: GGUFFile, outputs: list[_Output], dtype: str, on_progress: Callable[[str], None]
) -> Iterator[bytes]:
    """The bytes of a safetensors file with `outputs` in order, one chunk in memory at a time."""
    code, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for output in outputs:
        num_bytes = size * int(np.prod(output.source.shape))
        header[output.name] = {
            "dtype": code,
            "shape": list(output.source.shape),
            "data_offsets": [total, total + num_bytes],
        }
        total += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    done = 0
    shown = -1
    for output in outputs:
        for chunk in _values(file, output):
            encoded = _encode(chunk, dtype)
            if encoded is None:
                raise CheckpointError(
                    f"{file.path}: tensor {output.source.name} has values that {dtype} cannot hold"
                )
            yield encoded
            done += len(encoded)
            if (tenth := done * 10 // total) != shown:
                shown = tenth
                on_progress(f"converting {file.path.name} to {dtype}: {tenth * 10}%")


def _values(file: GGUFFile, output: _Output) -> Iterator[FloatArray]:
    if not output.permuted_heads:
        yield from file.rows(output.source)
        return
    # llama.cpp rotates neighbouring pairs, Hugging Face halves: its converter interleaved the rows
    # of each head, [2, half] -> [half, 2]. Back again.
    head_dim = output.source.shape[0] // output.permuted_heads
    for chunk in file.rows(output.source, row_group=head_dim):
        pairs = chunk.reshape(-1, head_dim // 2, 2, *chunk.shape[1:])
        yield pairs.swapaxes(1, 2).reshape(chunk.shape)


def _encode(values: FloatArray, dtype: str) -> bytes | None:
    """The little-endian bytes of `values` in `dtype`, rounded to nearest even; None on overflow."""
    if dtype == "float32":
        return values.astype("<f4", copy=False).tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        return None if (np.isinf(halves) & np.isfinite(values)).any() else halves.tobytes()
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    if ((rounded & 0x7FFF) == 0x7F80)[np.isfinite(values)].any():
        return None
    return rounded.astype("<u2").tobytes()


class _Directory:
    """Writes files that are on the disk when it says so, and remembers their sizes and digests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterator[bytes] | list[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        with (self._path / name).open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"size": size, "sha256": digest.hexdigest()}

    def sync(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def main(argv: list[str] | None = None) -> int:
    """The command: progress on standard output, one line of error on standard error, status 1 then."""
    parser = argparse.ArgumentParser(
        prog="python -m salver.model.gguf", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    options = parser.parse_args(argv)
    try:
        convert_gguf(options.source, options.destination, options.dtype, lambda line: print(line, flush=True))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = (
            "no space left on the disk; free some or choose another cache directory" if full else str(error)
        )
        print(f"{options.destination}: cannot write the converted checkpoint: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
