"""NomicBERT (Nussbaum et al. 2024): BERT with rotary positions and gated MLPs without biases."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec
from ..spec import Cat, Copy, NormSpec, RopePositions, Source
from . import encoder_family
from .bert import plain_head
from .encoder_names import (
    HeadNames,
    label_head,
    pair,
    problem_type,
    task_of,
    vocabulary_head,
    weight_map,
)
from .llama import rope_positions


@encoder_family(
    *("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForSequenceClassification"),
    "NomicBertForTokenClassification",
)
def nomic_bert(c: ConfigReader, architecture: str) -> EncoderSpec:
    hidden, num_heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % num_heads or hidden // num_heads % 2:
        raise c.error("num_attention_heads", f"({num_heads}) must cut hidden_size ({hidden}) into even parts")
    c.only("head_dim", hidden // num_heads)
    norm, inner = NormSpec("layer", c.number("layer_norm_eps", 1e-12)), c.size("intermediate_size")
    activation = c.choice("hidden_act", ("silu", "swish", "gelu"), "silu")
    task, labels = task_of(architecture), c.labels()
    if task == "MaskedLM":
        names = ("cls.predictions.transform.dense", "cls.predictions.transform.layer_norm")
        head: HeadNames | None = vocabulary_head(
            c, c.size("vocab_size"), hidden, activation, norm,
            (*names, "cls.predictions.bias", "cls.predictions.decoder"),
        )  # fmt: skip
    elif task == "SequenceClassification":
        head = label_head("input", len(labels), "classifier", dense="pooler.dense", dense_size=hidden)
    else:
        head = plain_head(task, len(labels))
    layer = "encoder.layers.{layer}"
    gate_up = (Copy(f"{layer}.mlp.fc12.weight"), Copy(f"{layer}.mlp.fc11.weight"))
    tensors: dict[str, Source] = {
        "embed.weight": Copy("embeddings.word_embeddings.weight"),
        "segments.weight": Copy("embeddings.token_type_embeddings.weight"),
        **pair("embedding_norm", "emb_ln"),
        "layers.{layer}.qkv.weight": Copy(f"{layer}.attn.Wqkv.weight"),
        "layers.{layer}.attention_out.weight": Copy(f"{layer}.attn.out_proj.weight"),
        "layers.{layer}.up.weight": Cat(gate_up, (inner, inner)),
        "layers.{layer}.down.weight": Copy(f"{layer}.mlp.fc2.weight"),
        **pair("layers.{layer}.attention_norm", f"{layer}.norm1"),
        **pair("layers.{layer}.mlp_norm", f"{layer}.norm2"),
    }
    extras = () if task == "SequenceClassification" else (r"pooler\..*",)
    return EncoderSpec(
        architecture=architecture,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=inner,
        max_input_tokens=c.size("max_position_embeddings"),
        norm=norm,
        activation=activation,
        weights=weight_map(tensors, head, "nomic_bert.", ignored=extras),
        head=head.spec if head else None,
        labels=labels,
        problem_type=problem_type(c),
        num_segments=c.size("type_vocab_size", 2),
        rope=rope_positions(c) if c.has("rope_parameters") else RopePositions(1000.0),
        gated=True,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        pad_token_id=c.token_id("pad_token_id"),
    )
