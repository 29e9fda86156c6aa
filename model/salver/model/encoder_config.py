"""The spec of any checkpoint, decoder or encoder. No torch: the front asks too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .config_reader import ConfigReader, FieldsRead, read_json, read_spec
from .decoder_heads import rank_activation
from .encoder_spec import EncoderSpec
from .families import ENCODER_FAMILIES
from .spec import ModelSpec


def read_any_spec(checkpoint: Path, fields: FieldsRead | None = None) -> ModelSpec | EncoderSpec:
    """The spec of the checkpoint directory, by the `architectures` of its config.json.

    `fields` is told what was read. Raises CheckpointError, naming file and field, for anything that is
    not implemented.
    """
    path = checkpoint / "config.json"
    config = read_json(path)
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    family = ENCODER_FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or name is None:
        return read_spec(checkpoint, fields)
    reader = ConfigReader(config, str(path), None if fields is None else fields.config)
    spec = family(reader, name)
    reader.boolean("tie_word_embeddings", True)  # means something to vocabulary heads alone, which read it
    activation = rank_activation(reader)
    reader.refuse_unread()
    return dataclasses.replace(spec, rank_activation=activation)
