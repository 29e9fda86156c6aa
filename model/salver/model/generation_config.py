"""The defaults that a checkpoint brings along, in generation_config.json. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .tokenizer.tokenizer import read_json

# Of transformers' GenerationConfig, what changes an answer and is not implemented, with its neutral values.
_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_length": (20,),
    "min_length": (0,),
    "penalty_alpha": (0.0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "watermarking_config": (),
}
MAX_LENGTH_PENALTY = 5.0  # of a beam search, either way: a score of the longest context stays a number


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What generation_config.json says; None (or empty) where it says nothing.

    temperature is 0 where it says do_sample: false (or nothing, of an encoder-decoder).
    `ignored` names what it says and is not implemented.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_directory(cls, path: Path, *, output_start: int = 0) -> GenerationConfig:
        """Raises CheckpointError, naming the file and the field that cannot be.

        `output_start`: of an encoder-decoder, with how many tokens its output begins. Its max_length and
        min_length are limits of the output, its forced tokens are honoured (see `ModelSpec`), it is greedy
        unless it says otherwise, and where there is no such file config.json stands in, as in transformers.
        """
        file = path / "generation_config.json"
        if output_start and not file.is_file():
            file = path / "config.json"
        reader = _Reader(file, read_json(file))
        temperature = reader.number("temperature", 0.0)
        if reader.values.get("do_sample") is False or (output_start and not reader.values.get("do_sample")):
            temperature = 0.0
        bad = reader.sequences("bad_words_ids") + tuple((i,) for i in reader.token_ids("suppress_tokens"))
        eos = reader.token_ids("eos_token_id")
        max_tokens = reader.count("max_new_tokens", 1)
        min_tokens = reader.count("min_new_tokens")
        honoured: tuple[str, ...] = ()
        if output_start:
            honoured = ("forced_bos_token_id", "forced_eos_token_id", "max_length", "min_length")
            longest, shortest = reader.count("max_length", 1 + output_start), reader.count("min_length")
            if max_tokens is None and longest is not None:
                max_tokens = longest - output_start
            if min_tokens is None and shortest:
                min_tokens = max(0, shortest - output_start)
        num_beams, early_stopping = reader.count("num_beams", 1), reader.values.get("early_stopping")
        searches = num_beams is not None and num_beams > 1
        draws = searches and reader.values.get("do_sample") is True
        if searches and not draws:
            reader.refuse_other_searches()
        if early_stopping not in (None, True, False, "never"):
            raise reader.wrong("early_stopping", 'true, false or "never" was expected')
        return cls(
            temperature=temperature,
            top_k=reader.count("top_k"),
            top_p=reader.number("top_p", 0.0, 1.0, open_low=True),
            min_p=reader.number("min_p", 0.0, 1.0),
            typical_p=reader.number("typical_p", 0.0, 1.0, open_low=True),
            repetition_penalty=reader.number("repetition_penalty", 0.0, open_low=True),
            no_repeat_ngram_size=reader.count("no_repeat_ngram_size"),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            # As in transformers: what is only an end of sequence stays possible.
            bad_token_sequences=tuple(word for word in bad if not (len(word) == 1 and word[0] in eos)),
            num_beams=None if draws else num_beams,
            length_penalty=reader.number("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
            early_stopping=early_stopping,
            ignored=("num_beams",) * draws
            + tuple(
                name
                for name, neutral in _NOT_IMPLEMENTED.items()
                if (value := reader.values.get(name)) is not None
                and value not in neutral
                and name not in honoured
            ),
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    file: Path
    values: dict[str, Any]

    def number(
        self, name: str, low: float, high: float = math.inf, *, open_low: bool = False
    ) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number was expected")
        if value < low or (open_low and value == low) or value > high:
            raise self.wrong(name, "is out of its range")
        return float(value)

    def count(self, name: str, least: int = 0) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least} was expected")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not _are_ids(ids):
            raise self.wrong(name, "token ids were expected")
        return tuple(ids)

    def sequences(self, name: str) -> tuple[tuple[int, ...], ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(ids, list) and _are_ids(ids) for ids in value):
            raise self.wrong(name, "lists of token ids were expected")
        return tuple(tuple(ids) for ids in value if ids)

    def refuse_other_searches(self) -> None:
        """Of beam searches, the plain one is implemented."""
        for name in ("num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"):
            if self.values.get(name) not in (None, 0, 1, []):
                raise self.wrong(name, "group and constrained beam search are not implemented")

    def wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} is {self.values[name]!r}; {what}")


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
