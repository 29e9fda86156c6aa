"""Decoders that generate nothing: bodies, whose hidden states are read, and classifiers. No torch.

A family is registered under the name of its language model; the names of its body and of its
classifiers lead to it too. What differs is the head, not the stack.
"""

from __future__ import annotations

from dataclasses import replace

from .classifier_spec import ClassifierSpec
from .config_reader import ConfigReader
from .spec import Copy, ModelSpec, Source, WeightMap

_CLASSIFIERS = {"ForSequenceClassification": "input", "ForTokenClassification": "tokens"}
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Families whose other names are tested; those whose language model is not STEMForCausalLM.
_STEMS = (
    *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Phi"),
    *("Phi3", "StableLm", "Starcoder2", "Glm", "Glm4", "SmolLM3", "GPTNeoX", "GPTNeo", "GPTJ", "GPTBigCode"),
    *("Bloom", "Falcon", "Mpt", "GptOss", "DeepseekV3"),
)
_WITHOUT_TOKENS = ("GPTJ", "Gemma3Text")  # classifiers of each token
_LANGUAGE_MODELS = {
    "GPT2": "GPT2LMHeadModel",
    "Gemma3Text": "Gemma3ForCausalLM",
    **{stem: f"{stem}ForCausalLM" for stem in _STEMS},
}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
_HEADS = r"(lm_head|embed_out)\..*"  # of the language model, where it was saved along


def decoder_variants() -> dict[str, str]:
    """The names in `architectures` that lead to a family, each with the name of its language model."""
    kinds = ("Model", *_CLASSIFIERS)
    return {
        f"{stem}{kind}": name
        for stem, name in _LANGUAGE_MODELS.items()
        for kind in kinds
        if kind != "ForTokenClassification" or stem not in _WITHOUT_TOKENS
    }


def with_head(spec: ModelSpec, c: ConfigReader, architecture: str) -> ModelSpec:
    """The language model's spec as that of another architecture of the family. Raises CheckpointError."""
    classifier = None
    for suffix, reads in _CLASSIFIERS.items():
        if architecture.endswith(suffix):
            classifier = _classifier(c, reads)
    if spec.embedding_size not in (None, spec.hidden_size):
        raise c.error("architectures", f"is {architecture}, which is not supported with narrow embeddings")
    return replace(
        spec,
        architecture=architecture,
        body=True,
        classifier=classifier,
        # Nothing reads it: what asks the model for a token's logits, to time it, is given the embeddings'.
        tied_head=True,
        head_bias=False,
        weights=_weights(spec.weights, classifier),
    )


def rank_activation(c: ConfigReader) -> str:
    """What sentence-transformers' CrossEncoder does with the score, in its old place or its new one."""
    section = c.section("sentence_transformers")
    name = c.choice("sbert_ce_default_activation_function", ("", *_ACTIVATIONS), "")
    if section is not None:
        name = section.choice("activation_fn", ("", *_ACTIVATIONS), name)
    return _ACTIVATIONS.get(name, "")


def _classifier(c: ConfigReader, reads: str) -> ClassifierSpec:
    padding = c.integer("pad_token_id", -1, least=-1)
    return ClassifierSpec(
        reads=reads,
        labels=c.labels(),
        problem_type=c.choice("problem_type", ("", *_PROBLEM_TYPES), ""),
        bias=reads == "tokens" and c.boolean("token_classification_bias", True),
        padding_id=None if padding < 0 else padding,
        rank_activation=rank_activation(c),
    )


def _weights(weights: WeightMap, classifier: ClassifierSpec | None) -> WeightMap:
    heads = ("head.weight", "head.bias")
    tensors: dict[str, Source] = {
        name: source for name, source in weights.tensors.items() if name not in heads
    }
    renames = weights.renames
    if classifier is not None:
        for kind in ("weight", "bias") if classifier.bias else ("weight",):
            tensors[f"classifier.{kind}"] = Copy(f"score.{kind}")
        renames = (*renames, (r"^classifier\.(weight|bias)", r"score.\1"))  # GPT-2's token classifiers
    return replace(
        weights, tensors=tensors, duplicates=(), renames=renames, ignored=(*weights.ignored, _HEADS)
    )
