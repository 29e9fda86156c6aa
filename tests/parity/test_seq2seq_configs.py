"""Encoder-decoders that nobody chose: random sizes and switches, in every way that they are written.

What a config leaves out is what transformers takes for it. The logits are those of the model that was saved.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_seq2seq import TOLERANCE, ours, texts
from safetensors.torch import load_file, save_file
from support.decoders import Variant
from support.seq2seq import BART, T5, logits_of, write
from support.stack import Stack

from salver.model.config_reader import read_spec

CASES = 36
ACTIVATIONS = ("relu", "gelu", "silu", "gelu_new")
FAMILIES = (
    "MarianMTModel", "BartForConditionalGeneration", "MBartForConditionalGeneration",
    "M2M100ForConditionalGeneration", "PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration",
    "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration",
)  # fmt: skip
KEPT = {"architectures", "model_type", "vocab_size", "decoder_start_token_id"}

pytestmark = pytest.mark.usefixtures("one_thread")


def fields_of(draw: random.Random, family: str) -> dict[str, Any]:
    """A config of the family."""
    heads = draw.choice((1, 2, 4))
    found: dict[str, Any] = {"vocab_size": 97, "d_model": 16 * heads}
    if "T5" in family:
        gated = draw.choice(("", "gated-"))
        found |= {
            "num_heads": heads, "d_kv": draw.choice((8, 12)), "d_ff": draw.choice((24, 64)),
            "num_layers": draw.randint(1, 3), "num_decoder_layers": draw.randint(1, 3),
            "feed_forward_proj": gated + draw.choice(("relu", "silu", "gelu")),
            "relative_attention_num_buckets": draw.choice((8, 32)),
            "relative_attention_max_distance": draw.choice((20, 128)),
            "layer_norm_epsilon": draw.choice((1e-6, 1e-3)), "tie_word_embeddings": draw.random() < 0.5,
        }  # fmt: skip
        return {**T5, **found}
    for side in ("encoder", "decoder"):
        found |= {
            f"{side}_layers": draw.randint(1, 3), f"{side}_attention_heads": draw.choice((heads, 2 * heads)),
            f"{side}_ffn_dim": draw.choice((24, 64)),
        }  # fmt: skip
    found |= {
        "activation_function": draw.choice(ACTIVATIONS), "scale_embedding": draw.random() < 0.5,
        "max_position_embeddings": draw.choice((64, 100)), "forced_bos_token_id": draw.choice((None, 7)),
        "forced_eos_token_id": draw.choice((None, 2)), "encoder_no_repeat_ngram_size": 0,
    }  # fmt: skip
    if family == "MarianMTModel" and draw.random() < 0.3:
        found |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 71}
    return {**BART, **found}


# ---- how it is written ----


def put(directory: Path, tensors: dict[str, Any]) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def as_saved(directory: Path, model: Any) -> None:
    pass


def in_shards(directory: Path, model: Any) -> None:
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1


def pickled(directory: Path, model: Any) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def pickled_in_shards(directory: Path, model: Any) -> None:
    (directory / "model.safetensors").unlink()
    names = list(state := model.state_dict())
    files: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, directory / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_prefix(directory: Path, model: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    put(directory, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def with_every_name(directory: Path, model: Any) -> None:
    """Tied tensors under each of their names, sinusoids, and what fairseq left."""
    extra = {} if "T5" in type(model).__name__ else {"model.encoder.version": torch.tensor([3.0])}
    put(directory, {**model.state_dict(), **extra})


def starts_by_generation_config(directory: Path, model: Any) -> None:
    said = {"decoder_start_token_id": 5, "forced_bos_token_id": 9}
    (directory / "generation_config.json").write_text(json.dumps(said))
    change(directory, lambda config: [config.pop(name, None) for name in said])
    assert read_spec(directory).output_start == (5, 9)


def by_an_older_transformers(directory: Path, model: Any) -> None:
    def older(config: dict[str, Any]) -> None:
        config["torch_dtype"] = config.pop("dtype", "float32")
        config |= {"transformers_version": "4.12.0", "gradient_checkpointing": False, "prefix": " "}
        config |= {
            "id2label": {"0": "A"},
            "label2id": {"A": 0},
            "pruned_heads": {},
            "task_specific_params": None,
        }

    change(directory, older)
    (directory / "generation_config.json").unlink(missing_ok=True)


WAYS: tuple[Callable[[Path, Any], None], ...] = (
    as_saved, in_shards, pickled, pickled_in_shards, without_prefix, with_every_name,
    starts_by_generation_config, by_an_older_transformers,
)  # fmt: skip


def change(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def leave_out(config: dict[str, Any], usual: dict[str, Any], draw: random.Random) -> None:
    """Some of what is as transformers has it anyway."""
    for name in list(config):
        same = name in usual and usual[name] == config[name]
        if same and name not in KEPT and draw.random() < 0.5:
            del config[name]


@pytest.mark.parametrize("case", range(CASES))
def test_the_logits_are_those_that_were_saved(case: int, tmp_path: Path) -> None:
    draw = random.Random(f"seq2seq/{case}")
    family, way = FAMILIES[case % len(FAMILIES)], WAYS[case % len(WAYS)]
    model = write(tmp_path, Variant(family, fields_of(draw, family)))
    usual = json.loads(type(model.config)().to_json_string(use_diff=False))
    change(tmp_path, lambda config: leave_out(config, usual, draw))
    way(tmp_path, model)
    stack = Stack(tmp_path, num_blocks=60)
    (source,), (output,) = texts([19]), texts([11], stack.model.spec.vocab_size, seed=1)
    expected = logits_of(model, source, output)
    assert expected.std() > 0.1, "logits this flat would show nothing"
    assert float((ours(stack, source, output) - expected).abs().max()) < TOLERANCE, way.__name__
