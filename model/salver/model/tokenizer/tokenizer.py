"""A checkpoint's tokenizer, as its tokenizer.json describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ..errors import CheckpointError
from .decoding import Decoding, read_decoding
from .encoding import EncodedText, encoded
from .vocabulary_files import add_listed_tokens, read_vocabulary_files

if TYPE_CHECKING:
    from .piece_vocabulary import PieceVocabulary

# Whose tokenizer a model has where the configs do not say; as AutoTokenizer knows.
_CLASS_OF = {
    "bart": "BartTokenizer",
    "blenderbot": "BlenderbotTokenizer",
    "m2m_100": "M2M100Tokenizer",
    "marian": "MarianTokenizer",
    "mbart": "MBartTokenizer",
    "mt5": "MT5Tokenizer",
    "pegasus": "PegasusTokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "umt5": "T5Tokenizer",
    "xglm": "XGLMTokenizer",
}
# Special tokens that name a language: M2M-100's, mBART's and NLLB's, Marian's.
_LANGUAGE = re.compile(r"__([a-z]{2,8})__|([a-z]{2,3}_(?:[A-Z]{2}|[A-Z][a-z]{3}))|>>(.+)<<")


class Tokenizer:
    """Text to ids and back. Nothing is ever truncated, padded or cleaned up.

    vocab_size: one more than the largest token id (the model may have more rows than that).
    bos_token_id: of tokenizer_config.json, else config.json; eos_token_ids: of the first of
    generation_config.json, config.json and tokenizer_config.json that names any, as transformers'
    generate takes them. special_token_ids: the ids that `skip_special_tokens` leaves out.
    languages: the ids of special tokens that name one, by its code.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        mask_token_id: int | None = None,
        pieces: PieceVocabulary | None = None,
    ) -> None:
        """`pieces`, where texts are not split by the backend but as these say."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._decoding: Decoding | None = _read_decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.mask_token_id = mask_token_id
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        special = ((index, _LANGUAGE.fullmatch(added[index].content)) for index in self.special_token_ids)
        found = {match[match.lastindex or 0]: index for index, match in special if match}
        self.languages = dict(sorted(found.items()))
        self._pieces = pieces

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json and the ids beside it. Raises CheckpointError, naming the file.

        Without that file, what `vocabulary_files` or `conversion` make of those that stand in for it.
        """
        settings = read_json(path / "tokenizer_config.json")
        backend, pieces = _read_backend(path, settings)
        config = read_json(path / "config.json")
        generation = read_json(path / "generation_config.json")
        bos = _named_id(backend, settings.get("bos_token"))
        if bos is None:
            bos = next(iter(_ids(path / "config.json", "bos_token_id", config)), None)
        eos = _ids(path / "generation_config.json", "eos_token_id", generation) or _ids(
            path / "config.json", "eos_token_id", config
        )
        if not eos:
            named = _named_id(backend, settings.get("eos_token"))
            eos = () if named is None else (named,)
        mask = _named_id(backend, settings.get("mask_token"))
        if mask is None:
            mask = next((i for i in map(backend.token_to_id, ("[MASK]", "<mask>")) if i is not None), None)
        return cls(backend, bos_token_id=bos, eos_token_ids=eos, mask_token_id=mask, pieces=pieces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens spelled in it are recognized, as in transformers."""
        if self._pieces is not None:
            return [index for index, _, _ in self._pieces.encode(text, special=add_special_tokens)]
        # As a batch of one: `encode` would hold the interpreter's lock for as long as it takes.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_output(self, text: str) -> list[int]:
        """The ids of a text that a model writes, as an encoder-decoder's other side; no special tokens."""
        if self._pieces is not None:
            return [index for index, _, _ in self._pieces.encode(text, special=False, output=True)]
        return self.encode(text, add_special_tokens=False)

    def encode_written(self, text: str) -> EncodedText:
        """As `encode_output`, with everything that leads back to the text."""
        if self._pieces is not None:
            return self._pieces.encode_input(text, output=True)
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        return encoded(encoding)

    @property
    def reads_pairs(self) -> bool:
        """Whether something stands between the texts of a pair; else they would run into one another."""
        count = self._backend.num_special_tokens_to_add
        return bool(count(True) > count(False))

    def encode_input(self, text: str, pair: str | None = None) -> EncodedText:
        """A text, or a pair that is read together, with its special tokens."""
        if self._pieces is not None:
            assert pair is None, "an encoder-decoder reads one text"
            return self._pieces.encode_input(text)
        (encoding,) = self._backend.encode_batch([text if pair is None else (text, pair)])
        return encoded(encoding)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """(id, start, end) of each token of `text`, in code points.

        start equals end for a token that stands for no text; the tokens that share one character
        each have that whole character.
        """
        if self._pieces is not None:
            return self._pieces.encode(text, special=add_special_tokens)
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return [(index, *span) for index, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD; ids of no token are left out.

        With `continuation` the ids carry on an earlier text, so that a SentencePiece tokenizer's
        leading space stays. Equal to what `tokenizers` decodes, but for byte-fallback runs that are
        not UTF-8, where that library gives up the whole run and this only what is broken.
        """
        from .detokenizer import Detokenizer  # it needs this module

        if self.decoding is None:
            return self.backend_decode(list(ids), skip_special_tokens)
        detokenizer = Detokenizer(self, skip_special_tokens, continuation=continuation)
        return "".join([*map(detokenizer.add, ids), detokenizer.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text, b"" for an id of no token.

        Where the decoder defines no bytes (WordPiece ...), the UTF-8 of the token's own spelling.
        """
        found = self._bytes.get(token_id)
        if found is None:
            token = self.token(token_id)
            if token is None:
                found = b""
            elif self._decoding is None:
                found = token.encode()
            else:
                found = self._decoding.token_bytes(token)
            self._bytes[token_id] = found
        return found

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells the token; None for an id of no token."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    @property
    def decoding(self) -> Decoding | None:
        """How tokens become bytes; None where only whole sequences become text."""
        return self._decoding

    def backend_decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of `ids` as the library decodes them."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


def _read_backend(
    path: Path, settings: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, PieceVocabulary | None]:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file)), None
        except Exception as error:  # what the library raises is a bare Exception
            raise CheckpointError(f"{file}: not a tokenizer that can be read: {error}") from error
    config = read_json(path / "config.json")
    model_type = str(config.get("model_type"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or _CLASS_OF.get(model_type)
    # What tokenizer_config.json does not name may be named there.
    special = read_json(path / "special_tokens_map.json")
    settings = {**settings, "tokenizer_class": name}
    backend = read_vocabulary_files(path, {**special, **settings})
    if backend is None:
        from .conversion import convert  # protobuf is loaded where it is needed
        from .piece_vocabulary import read_piece_vocabulary

        if (found := read_piece_vocabulary(path, settings, special)) is not None:
            return found[1], found[0]
        backend = convert(path, settings, special, model_type)
    if backend is None:
        raise CheckpointError(
            f"{file}: missing; no SentencePiece model, no vocab.txt and no vocab.json and merges.txt stand in"
        )
    add_listed_tokens(backend, path, settings, special)
    return backend, None


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} where there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return value


def token_text(value: object) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_decoding(backend: tokenizers.Tokenizer) -> Decoding | None:
    # The pickle state of a decoder is its JSON; that of the whole tokenizer would take long.
    return None if backend.decoder is None else read_decoding(json.loads(backend.decoder.__getstate__()))


def _named_id(backend: tokenizers.Tokenizer, value: object) -> int | None:
    text = token_text(value)
    return None if text is None else backend.token_to_id(text)


def _ids(file: Path, key: str, config: dict[str, Any]) -> tuple[int, ...]:
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise CheckpointError(f"{file}: {key} is {value!r}, not a token id or a list of them")
    return tuple(ids)
