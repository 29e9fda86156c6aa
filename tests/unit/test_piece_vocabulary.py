"""Tokenizers of translation models: pieces of SentencePiece models, ids of a vocab.json, languages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.seq2seq import WORDS, write_pieces

from salver.model.encoder_spec import EncoderSpec
from salver.model.errors import CheckpointError
from salver.model.spec import LearnedPositions, ModelSpec, NormSpec, WeightMap
from salver.model.tokenizer import Tokenizer
from salver.server.rpc.errors import ApiError
from salver.server.rpc.sources import Source, check_languages, source_of
from salver.server.rpc.validation import Violations

CODES = ("__de__", "__en__", "__fr__")


def write_marian(directory: Path, **settings: Any) -> list[str]:
    read = write_pieces(directory / "source.spm", WORDS[:7])
    written = write_pieces(directory / "target.spm", WORDS[7:])
    pieces = list(dict.fromkeys(["</s>", "<unk>", *read, *written, ">>de<<", ">>fr<<", "<pad>"]))
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return pieces


def write_m2m100(directory: Path) -> list[str]:
    read = write_pieces(directory / "sentencepiece.bpe.model", WORDS)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *read]
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "M2M100Tokenizer"}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": CODES}))
    return [*pieces, *CODES]


@pytest.mark.parametrize("named", [True, False])
def test_marian_has_a_tokenizer_for_each_side(named: bool, tmp_path: Path) -> None:
    pieces = write_marian(tmp_path, **({"tokenizer_class": "MarianTokenizer"} if named else {}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    spelled = [pieces[i] for i in tokenizer.encode("the cat, katze")]
    assert spelled == ["▁the", "▁cat", ",", "▁", *"katze", "</s>"]
    assert [pieces[i] for i in tokenizer.encode_output("die katze, the")] == [
        "▁die", "▁katze", ",", "▁", *"the",
    ]  # fmt: skip
    assert tokenizer.languages == {"de": pieces.index(">>de<<"), "fr": pieces.index(">>fr<<")}
    ids = tokenizer.encode(">>fr<< the cat")
    assert [pieces[i] for i in ids] == [">>fr<<", "▁the", "▁cat", "</s>"]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.encode("the ☃")[1] in (pieces.index("▁"), pieces.index("<unk>"))
    assert pieces.index("<unk>") in tokenizer.encode("the ☃")
    assert tokenizer.encode("") == [0]


def test_where_the_tokens_of_a_text_stand(tmp_path: Path) -> None:
    pieces = write_marian(tmp_path)
    found = Tokenizer.from_directory(tmp_path).encode_with_offsets(">>fr<<the cat")
    assert found[0] == (pieces.index(">>fr<<"), 0, 6)
    assert found[1][2] == 9 and found[2][1:] == (9, 13) and found[-1] == (0, 13, 13)


def test_m2m100_begins_with_a_language(tmp_path: Path) -> None:
    pieces = write_m2m100(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert [pieces[i] for i in tokenizer.encode("the cat")] == ["__en__", "▁the", "▁cat", "</s>"]
    assert tokenizer.languages == {code.strip("_"): pieces.index(code) for code in CODES}
    assert tokenizer.vocab_size == len(pieces)


def test_what_is_not_implemented_is_refused(tmp_path: Path) -> None:
    write_marian(tmp_path, separate_vocabs=True)
    with pytest.raises(CheckpointError, match="separate_vocabs"):
        Tokenizer.from_directory(tmp_path)
    write_marian(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(CheckpointError, match="<unk> is not in the vocabulary"):
        Tokenizer.from_directory(tmp_path)


# ---- languages of requests ----


def spec_of(**fields: Any) -> ModelSpec:
    norm = NormSpec("layer", 1e-5)
    encoder = EncoderSpec("X", 50, 8, 1, 1, 8, 32, norm, "relu", WeightMap())
    return ModelSpec(
        "X", 50, 8, 1, 1, 1, 8, 8, 32, norm, LearnedPositions(), "relu", False, True, True, True, True,
        encoder=encoder, **fields,
    )  # fmt: skip


def model_of(tokenizer: Tokenizer, **fields: Any) -> Any:
    spec = spec_of(**fields)
    return SimpleNamespace(tokenizer=tokenizer, spec=spec, source=spec.encoder, architecture="X")


def asked(target: str = "", source: str = "") -> Any:
    return SimpleNamespace(target_language=target, source_language=source)


def read(request: Any, model: Any, ids: tuple[int, ...]) -> Source:
    violations = Violations()
    check_languages(request, model, violations)
    violations.raise_any()
    return source_of(request, ids, model)


def test_a_language_stands_where_the_model_expects_it(tmp_path: Path) -> None:
    pieces = write_m2m100(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    de, en, fr = (pieces.index(code) for code in CODES)
    model = model_of(tokenizer, decoder_start_token_id=2)
    assert read(asked(), model, (en, 9, 2)) == Source((en, 9, 2), (2,))
    assert read(asked("fr"), model, (en, 9, 2)) == Source((en, 9, 2), (2, fr))
    assert read(asked("fr", "de"), model, (en, 9, 2)) == Source((de, 9, 2), (2, fr))
    assert read(asked("fr", "de"), model, (9, 2, en)) == Source((9, 2, de), (2, fr)), "mBART's: at the end"
    assert read(asked("fr", "de"), model, (9, 2)) == Source((de, 9, 2), (2, fr))
    forced = model_of(tokenizer, decoder_start_token_id=2, forced_bos_token_id=de)
    assert read(asked(), forced, (9, 2)) == Source((9, 2), (2, de))
    assert read(asked("fr"), forced, (9, 2)) == Source((9, 2), (2, fr))
    named = model_of(tokenizer, decoder_start_token_id=de)  # mBART's output begins with its language alone
    assert read(asked("fr"), named, (9, 2)) == Source((9, 2), (fr,))
    assert read(asked("fr"), model_of(tokenizer), (9, 2)) == Source((9, 2), (fr,))


def test_languages_that_cannot_be(tmp_path: Path) -> None:
    write_m2m100(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    model = model_of(tokenizer, decoder_start_token_id=2)
    for request, of, field in [
        (asked("xx"), model, "target_language"),
        (asked("", "xx"), model, "source_language"),
        (asked(), model_of(tokenizer), "target_language"),
        (asked("fr"), SimpleNamespace(**{**vars(model), "source": None}), "target_language"),
    ]:
        with pytest.raises(ApiError) as error:
            read(request, of, (9, 2))
        assert [violation.field for violation in error.value.violations] == [field]


def test_marians_language_is_told_once(tmp_path: Path) -> None:
    pieces = write_marian(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    de, fr = pieces.index(">>de<<"), pieces.index(">>fr<<")
    model = model_of(tokenizer, decoder_start_token_id=5)
    assert read(asked("fr"), model, (9, 0)) == Source((fr, 9, 0), (5,))
    assert read(asked("fr"), model, (de, 9, 0)) == Source((fr, 9, 0), (5,))
    with pytest.raises(ApiError) as error:
        read(asked("fr", "de"), model, (9, 0))
    assert [violation.field for violation in error.value.violations] == ["source_language"]
