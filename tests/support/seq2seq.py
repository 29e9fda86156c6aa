"""Small random checkpoints of every encoder-decoder family, in every variant that its config has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.decoders import Variant

VOCAB, CONTEXT = 97, 160
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 3,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}


def _variants(model: str, base: dict[str, Any], **variants: dict[str, Any]) -> dict[str, Variant]:
    named = {"plain": {}, **variants}
    short = model.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
    return {f"{short} {name}": Variant(model, {**base, **fields}) for name, fields in named.items()}


VARIANTS: dict[str, Variant] = {
    **_variants(
        "MarianMTModel",
        BART,
        paper={"activation_function": "relu", "scale_embedding": True},
        own={"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 71},
    ),
    **_variants("BartForConditionalGeneration", BART, scaled={"scale_embedding": True}),
    **_variants("MBartForConditionalGeneration", BART, scaled={"scale_embedding": True}),
    **_variants("M2M100ForConditionalGeneration", BART, unscaled={"scale_embedding": False}),
    **_variants("PegasusForConditionalGeneration", {**BART, "activation_function": "relu"}),
    **_variants("BlenderbotForConditionalGeneration", {**BART, "encoder_no_repeat_ngram_size": 0}),
    **_variants(
        "T5ForConditionalGeneration",
        T5,
        flan={"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        silu={"feed_forward_proj": "gated-silu"},
    ),
    **_variants("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    **_variants("UMT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
}


def write(directory: Path, variant: Variant) -> Any:
    """The checkpoint of a variant; gives transformers' model. The bias of the logits is random too."""
    model = variant.build()
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_(0.0, 0.5)
    for module in model.modules():
        if hasattr(module, "create_weight"):  # sinusoids, which `build` took for weights
            module.weight.data.copy_(module.create_weight())
    model.save_pretrained(directory)
    return model


def write_tiny_marian(directory: Path) -> Path:
    """The paper's form, in sizes that the native kernel takes in every precision."""
    sizes = {"d_model": 64, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = {**VARIANTS["Marian paper"].config, **sizes}
    write(directory, Variant("MarianMTModel", config))
    return directory


# ---- a whole translation model, with its two tokenizers ----

LANGUAGES = (">>de<<", ">>fr<<")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "der", "die", "katze", "hund", "sa", "auf", "matte")


def write_pieces(file: Path, words: tuple[str, ...]) -> list[str]:
    """A SentencePiece model of letters and words; its pieces but for the special ones."""
    from salver.model.tokenizer.sentencepiece import CONTROL, SPACE, UNIGRAM, model_class

    model = model_class()()
    pieces = [SPACE, *(SPACE + word for word in words), *"abcdefghijklmnopqrstuvwxyz.,"]
    for piece, kind in (("<unk>", 2), ("<s>", CONTROL), ("</s>", CONTROL)):
        model.pieces.add(piece=piece, type=kind, score=0.0)
    for place, piece in enumerate(pieces):
        model.pieces.add(piece=piece, type=1, score=-1.0 - 0.1 * place)
    model.trainer_spec.model_type = UNIGRAM
    file.write_bytes(model.SerializeToString())
    return pieces


def write_translator(directory: Path) -> Any:
    """A random Marian checkpoint as published: source.spm, target.spm, vocab.json. transformers' model."""
    import json

    directory.mkdir(exist_ok=True)
    read = write_pieces(directory / "source.spm", WORDS[:7])
    written = write_pieces(directory / "target.spm", WORDS[7:])
    spelled = list(dict.fromkeys(["</s>", "<unk>", *read, *written, *LANGUAGES, "<pad>"]))
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(spelled)}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    size = len(spelled)
    fields = {
        **BART, "vocab_size": size, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": size - 1,
        "decoder_start_token_id": size - 1, "forced_eos_token_id": 0, "bad_words_ids": [[size - 1]],
    }  # fmt: skip
    return write(directory, Variant("MarianMTModel", fields))


@torch.inference_mode()
def logits_of(reference: Any, source: list[int], output: list[int]) -> torch.Tensor:
    """[n, vocab] of transformers' or PEFT's model."""
    ids = torch.tensor([source])
    found: torch.Tensor = reference(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([output])
    ).logits[0]
    return found
