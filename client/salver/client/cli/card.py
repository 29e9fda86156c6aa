"""`salver card`: the model card as a page."""

from __future__ import annotations

import argparse
import json

from salver.client.cli.connection import connect
from salver.client.cli.output import as_json, table
from salver.client.model_card import ModelCard

_SOURCES = {
    "config": "config.json",
    "family": "the architecture",
    "derived": "computed",
    "generation_config": "generation_config.json",
}


def card(options: argparse.Namespace) -> None:
    with connect(options) as client:
        found = client.model_card(options.model or "", context=options.context, timeout=options.timeout)
    if options.json:
        as_json(found)
        return
    model = found.model
    print(f"{model.name}: {model.architecture}, {model.num_parameters:,} parameters")
    weights = "as they are" if model.quantization in ("", "none") else f"in {model.quantization}"
    print(f"computed in {model.dtype}, weights {weights}, on {found.device}, kernel {found.kernels}")
    _parameters(found)
    if options.tensors:
        _tensors(found)
    _hyperparameters(found)
    _memory(found)
    _speed(found)


def _title(text: str) -> None:
    print(f"\n{text}")


def _parameters(card: ModelCard) -> None:
    _title("Parameters: what training has learned")
    total = sum(part.weights + part.biases for part in card.parameters)
    rows = [
        (
            p.part, p.tensors, f"{p.weights:,}", f"{p.biases:,}",
            f"{(p.weights + p.biases) / total:.1%}", size(p.held_bytes),
        )
        for p in card.parameters
    ]  # fmt: skip
    table(("part", "tensors", "weights", "biases", "share", "memory"), rows)


def _tensors(card: ModelCard) -> None:
    _title("Tensors")
    rows = [
        (t.name, " x ".join(map(str, t.shape)), t.dtype, size(t.bytes), ", ".join(t.checkpoint_names))
        for t in card.tensors
    ]
    table(("name", "shape", "dtype", "loaded", "in the checkpoint"), rows)


def _hyperparameters(card: ModelCard) -> None:
    _title("Hyperparameters: what people have chosen")
    rows = [
        (h.name, _short(json.dumps(h.value, ensure_ascii=False)), _SOURCES.get(h.source, h.source), h.field)
        for h in card.hyperparameters
    ]
    table(("name", "value", "from", "field"), rows)


def _memory(card: ModelCard) -> None:
    memory = card.memory
    _title("Memory")
    rows: list[tuple[str, object]] = [
        ("weights, by their shapes", size(memory.predicted_weight_bytes)),
        ("weights, as held", size(memory.held_weight_bytes)),
    ]
    if memory.kv_bytes_per_token:
        rows += [
            ("keys and values of a token", size(memory.kv_bytes_per_token)),
            ("cache", f"{size(memory.kv_cache_bytes)}, {memory.kv_cache_tokens:,} tokens"),
            (f"sequences of {card.context:,} tokens in the cache", f"{memory.sequences:,}"),
        ]
    rows.append(("sequences computed at once, at most", f"{memory.max_num_seqs:,}"))
    table(("", "value"), rows)


def _speed(card: ModelCard) -> None:
    speed = card.speed
    _title(f"Speed, of sequences of {card.context:,} tokens")
    print(
        f"the device at best, as far as it was seen: {count(speed.memory_bytes_per_second)}B/s of memory, "
        f"{count(speed.operations_per_second)} operations/s"
    )
    prompt = (
        "a token of a prompt", count(speed.prefill_operations), "",
        _rate(speed.prefill_bound), _rate(speed.prefill_warm_up), _rate(speed.prefill_measured),
    )  # fmt: skip
    rows = [prompt]
    if speed.decode_operations is not None and speed.decode_bytes is not None:
        rows.append((
            "the next token of one stream", count(speed.decode_operations), size(speed.decode_bytes),
            _rate(speed.decode_bound), _rate(speed.decode_warm_up), _rate(speed.decode_measured),
        ))  # fmt: skip
    table(("", "operations", "reads", "at best/s", "warm-up/s", "measured/s"), rows)


def _rate(value: float | None) -> str:
    return "" if not value else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def size(number: float) -> str:
    """Bytes, as 93.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def count(number: float) -> str:
    """A large number, as 269 M."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} T"


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
