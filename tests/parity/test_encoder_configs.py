"""Checkpoints of encoders that nobody chose: random sizes, activations, heads and ways to be written.

What a config leaves out is what transformers takes for it; names may be old, prefixes missing or there
without need, files sharded or pickled. The answer is transformers' own, or a refusal that names a field.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoders import CONFIGS, HEADS, Oracle, answers, load, write_encoder
from support.stack import random_prompts

from salver.model.encoder_config import read_any_spec
from salver.model.encoder_spec import EncoderSpec

TOLERANCE = 1e-4
CASES = 48
ACTIVATIONS = ("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu")
PREFIXES = {
    "Bert": "bert.", "Roberta": "roberta.", "XLMRoberta": "roberta.", "Camembert": "roberta.",
    "Electra": "electra.", "Albert": "albert.", "MPNet": "mpnet.", "DistilBert": "distilbert.",
    "ModernBert": "model.", "NomicBert": "nomic_bert.", "DebertaV2": "deberta.",
}  # fmt: skip
KEPT = {"architectures", "model_type", "id2label", "label2id", "vocab_size"}


def changes_of(draw: random.Random, family: str) -> dict[str, Any]:
    """Fields of a config of the family."""
    heads = draw.choice((1, 2, 3, 4))
    hidden = heads * draw.choice((4, 8, 12))
    found: dict[str, Any] = {
        "vocab_size": draw.choice((64, 97, 130)), "hidden_size": hidden, "num_attention_heads": heads,
        "num_hidden_layers": draw.choice((1, 2, 3)), "intermediate_size": draw.choice((20, 36, 64)),
        "hidden_act": draw.choice(ACTIVATIONS), "layer_norm_eps": draw.choice((1e-12, 1e-5, 1e-3)),
    }  # fmt: skip
    if family == "DistilBert":
        names = {
            "hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
            "intermediate_size": "hidden_dim", "hidden_act": "activation", "vocab_size": "vocab_size",
        }  # fmt: skip
        return {names[name]: value for name, value in found.items() if name in names}
    if family == "ModernBert":
        found["hidden_activation"], found["norm_eps"] = found.pop("hidden_act"), found.pop("layer_norm_eps")
        for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
            found[name] = draw.random() < 0.5
        found |= {
            "global_attn_every_n_layers": draw.choice((1, 2, 3)),
            "local_attention": draw.choice((4, 8)),
        }
        found |= {"classifier_pooling": draw.choice(("cls", "mean")), "hidden_size": 2 * hidden}
    if family == "NomicBert":
        found |= {"hidden_act": draw.choice(("silu", "gelu")), "hidden_size": 2 * hidden}
    if family in ("Electra", "Albert", "DebertaV2"):
        found["embedding_size"] = draw.choice((12, hidden))
    if family in ("Bert", "Electra", "Albert"):
        found["type_vocab_size"] = draw.choice((1, 2, 3))
    if family == "DebertaV2":
        found |= {
            "pos_att_type": draw.choice((["c2p"], ["p2c"], ["c2p", "p2c"], "p2c|c2p")),
            "share_att_key": draw.random() < 0.5, "position_buckets": draw.choice((-1, 4, 16)),
            "norm_rel_ebd": draw.choice(("none", "layer_norm")), "conv_kernel_size": draw.choice((0, 3, 5)),
            "position_biased_input": draw.random() < 0.5, "type_vocab_size": draw.choice((0, 2)),
            "pooler_hidden_act": draw.choice(("gelu", "tanh", "relu")), "legacy": True,
        }  # fmt: skip
    return found


def without_defaults(config: dict[str, Any], family: str) -> dict[str, Any]:
    """Only what is not what the class of the config takes for it."""
    import transformers

    usual = getattr(transformers, f"{family}Config")().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name in KEPT or name not in usual or usual[name] != value
    }


def as_before(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    found = {"torch_dtype": "float32", "transformers_version": "4.30.0", **config}
    found.pop("dtype", None)
    parameters = found.pop("rope_parameters", None)
    if parameters and "full_attention" in parameters:
        found["global_rope_theta"] = parameters["full_attention"]["rope_theta"]
        found["local_rope_theta"] = parameters["sliding_attention"]["rope_theta"]
    elif parameters:
        found["rope_parameters"] = parameters  # NomicBERT had another layout: test_encoders.py
    return found


def rewritten(draw: random.Random, directory: Path, family: str, config: dict[str, Any]) -> None:
    """The weights under other names and in other files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    prefix, whole = PREFIXES[family], not config["architectures"][0].endswith("Model")
    if draw.random() < 0.5:
        heads = ("cls.", "lm_head.", "classifier.", "qa_outputs.", "generator_", "predictions.", "vocab_",
                 "pre_classifier.", "pooler.", "head.", "decoder.")  # fmt: skip
        if whole:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        elif family != "ModernBert":
            tensors = {
                prefix + name: tensor for name, tensor in tensors.items() if not name.startswith(heads)
            }
    if draw.random() < 0.5 and family in ("Bert", "Roberta", "Electra"):
        old = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        for new_name, old_name in old:
            tensors = {name.replace(new_name, old_name): tensor for name, tensor in tensors.items()}
    kind = draw.choice(("safetensors", "bin", "shards", "bin shards"))
    parts = [dict(list(tensors.items())[place::3]) for place in range(3)] if "shards" in kind else [tensors]
    suffix = ".bin" if "bin" in kind else ".safetensors"
    stem = "pytorch_model" if "bin" in kind else "model"
    index: dict[str, str] = {}
    for place, part in enumerate(parts):
        name = f"{stem}-{place + 1:05}-of-00003{suffix}" if "shards" in kind else f"{stem}{suffix}"
        index |= dict.fromkeys(part, name)
        if "bin" in kind:
            torch.save(part, directory / name)
        else:
            save_file(part, directory / name)
    if "shards" in kind:
        path = directory / f"{stem}{suffix}.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("seed", range(CASES))
def test_as_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    family = list(CONFIGS)[seed % len(CONFIGS)]
    head = draw.choice([h for h in HEADS if (family, h) != ("NomicBert", "ForQuestionAnswering")])
    changes = changes_of(draw, family)
    write_encoder(tmp_path, family + head, **changes)
    oracle = Oracle(tmp_path, family + head)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if draw.random() < 0.6:
        config = without_defaults(config, family)
    if draw.random() < 0.5:
        config = as_before(config)
    path.write_text(json.dumps(config))
    rewritten(draw, tmp_path, family, config)
    vocabulary = changes["vocab_size"]
    inputs = [[3 + i for i in ids] for ids in random_prompts(vocabulary - 3, [40, 1, 9, 9], seed)]
    for ids, found in zip(inputs, answers(load(tmp_path), inputs), strict=True):
        assert float((found - oracle(ids)).abs().max()) < TOLERANCE, (family + head, changes)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_that_a_config_leaves_out(family: str, tmp_path: Path) -> None:
    import transformers

    usual = getattr(transformers, f"{family}Config")()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [f"{family}Model"]}))
    spec = read_any_spec(tmp_path)
    assert isinstance(spec, EncoderSpec)
    names = (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "max_position_embeddings",
    )
    inner = getattr(usual, "intermediate_size" if family != "DistilBert" else "hidden_dim")
    rows = spec.max_input_tokens + (0 if spec.positions is None else spec.positions.offset)
    found = (spec.vocab_size, spec.hidden_size, spec.num_heads, len(spec.order), rows, spec.intermediate_size)
    assert found == (*(getattr(usual, name) for name in names), inner)
