"""A SentencePiece model (tokenizer.model) as a tokenizer of the `tokenizers` library.

What a model means is in its own settings (Kudo & Richardson 2018); the messages are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

# (name, number, type) of the fields that are read; the others are passed over.
_INT, _BOOL, _STRING, _BYTES, _FLOAT = 5, 8, 9, 12, 2
_FIELDS = {
    "Piece": (("piece", 1, _STRING), ("score", 2, _FLOAT), ("type", 3, _INT)),
    "TrainerSpec": (
        ("model_type", 3, _INT), ("byte_fallback", 35, _BOOL), ("unk_id", 40, _INT),
        ("unk_piece", 45, _STRING),
    ),
    "NormalizerSpec": (
        ("precompiled_charsmap", 2, _BYTES), ("add_dummy_prefix", 3, _BOOL),
        ("remove_extra_whitespaces", 4, _BOOL), ("escape_whitespaces", 5, _BOOL),
    ),
}  # fmt: skip
_DEFAULTS = {
    "type": "1", "model_type": "1", "unk_piece": "<unk>", "add_dummy_prefix": "true",
    "remove_extra_whitespaces": "true", "escape_whitespaces": "true",
}  # fmt: skip


def model_class() -> Callable[[], Any]:
    """The message ModelProto: pieces, trainer_spec, normalizer_spec."""
    file = descriptor_pb2.FileDescriptorProto(
        name="salver_sentencepiece.proto", package="salver.sp", syntax="proto2"
    )
    optional, repeated = 1, 3
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            message.field.add(
                name=field, number=number, type=kind, label=optional, default_value=_DEFAULTS.get(field)
            )
    model = file.message_type.add(name="ModelProto")
    for field, number, name, label in (
        ("pieces", 1, "Piece", repeated),
        ("trainer_spec", 2, "TrainerSpec", optional),
        ("normalizer_spec", 3, "NormalizerSpec", optional),
    ):
        model.field.add(name=field, number=number, type=11, type_name=f".salver.sp.{name}", label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found: Callable[[], Any] = message_factory.GetMessageClass(
        pool.FindMessageTypeByName("salver.sp.ModelProto")
    )
    return found


def read_model(path: Path) -> Any:
    """The message ModelProto in a file. Raises CheckpointError."""
    model = model_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model that can be read: {error}") from error
    if not model.pieces:
        raise CheckpointError(f"{path}: a SentencePiece model without pieces")
    return model


def read_sentencepiece(
    path: Path,
    *,
    front: Sequence[str] = (),
    replaced: int = 0,
    back: Sequence[str] = (),
    unknown: str = "",
) -> Tokenizer:
    """The tokenizer of a model file; its control pieces are special tokens. Raises CheckpointError.

    With pieces of other ids: those of `front` stand in the place of the first `replaced`, those of `back`
    at the end, and `unknown` is what is not in the vocabulary.
    """
    model = read_model(path)
    if front or back:
        _rearrange(path, model, front, replaced, back, unknown)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(
            f"{path}: only unigram and bpe models are implemented, not {trainer.model_type}"
        )
    tokenizer = Tokenizer(_model(model))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(normalizer))
    pre_tokenizer = _pre_tokenizers(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
    tokenizer.decoder = _decoder(trainer.byte_fallback, normalizer.add_dummy_prefix)
    # User-defined pieces are kept whole by the pre-tokenizer: as added tokens they would begin texts anew.
    control = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return tokenizer


def _rearrange(
    path: Path, model: Any, front: Sequence[str], replaced: int, back: Sequence[str], unknown: str
) -> None:
    """Gives the message's pieces other ids."""
    kept = [(piece.piece, piece.score, piece.type) for piece in model.pieces][replaced:]
    del model.pieces[:]
    added = [[(piece, 0.0, CONTROL) for piece in pieces] for pieces in (front, back)]
    ids: dict[str, int] = {}
    for piece, score, kind in (*added[0], *kept, *added[1]):
        ids.setdefault(piece, len(model.pieces))
        model.pieces.add(piece=piece, score=score, type=kind)
    if unknown not in ids:
        raise CheckpointError(f"{path}: {unknown} is not among its pieces")
    model.trainer_spec.unk_id, model.trainer_spec.unk_piece = ids[unknown], unknown
    model.pieces[ids[unknown]].type = UNKNOWN


def _model(model: Any) -> models.Model:
    trainer = model.trainer_spec
    if trainer.model_type == UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
        return models.Unigram(vocabulary, trainer.unk_id, trainer.byte_fallback)
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    user_defined = any(piece.type == USER_DEFINED for piece in model.pieces)
    return models.BPE(
        vocab=ids,
        merges=_merges(model),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=user_defined,
    )


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece with the best score first."""
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    ranked = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        found.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # spaces alone: other white space stays
        found.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        found.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        found.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix:  # Metaspace leaves it out where the text begins with the mark
        found.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    return found


def _pre_tokenizers(model: Any) -> list[pre_tokenizers.PreTokenizer]:
    found: list[pre_tokenizers.PreTokenizer] = []
    if model.normalizer_spec.add_dummy_prefix:
        found.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False))
    whole = sorted((p.piece for p in model.pieces if p.type == USER_DEFINED), key=len, reverse=True)
    if whole:  # never merged with what stands beside them
        found.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), behavior="isolated"))
    return found


def _decoder(byte_fallback: bool, dummy_prefix: bool) -> decoders.Decoder:
    found: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        found.append(decoders.ByteFallback())
    found.append(decoders.Fuse())
    if dummy_prefix:
        found.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(found)
