"""Small tokenizers of each kind of decoder, built by the `tokenizers` library."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: 256 bytes, a few merges (one across a character's bytes), special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("ð", "Ł"), ("Ġ", "ðŁ"), ("i", "n")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("two words"), AddedToken("naïve 👍")])
    return tokenizer


def sentence_piece() -> tokenizers.Tokenizer:
    """Llama 2's kind: a marker for spaces, byte fallback, one leading space stripped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [*"abcdefghijklmnopqrstuvwxyzé", "▁t", "▁a", "▁▁"]
    merges = [("▁", "t"), ("▁", "a"), ("▁", "▁")]
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """T5's kind: the Metaspace decoder, which drops the first token's markers."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyzé")]
    pieces += [("▁the", -1.0), ("▁a", -1.5), ("▁▁", -4.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """BERT's kind: text only of whole sequences."""
    words = ["[UNK]", "[CLS]", "the", "cat", "##s", "sat", ".", ",", "'", "don", "t", "##é", "n't", "do"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
