"""The configuration that a request is answered with: its own values, the checkpoint's, the server's."""

from __future__ import annotations

from typing import Any

from salver.model.generation_config import GenerationConfig
from salver.v1 import common_pb2

Configuration = common_pb2.GenerationConfiguration
REQUEST = common_pb2.CONFIGURATION_ORIGIN_REQUEST
CHECKPOINT = common_pb2.CONFIGURATION_ORIGIN_CHECKPOINT
SERVER = common_pb2.CONFIGURATION_ORIGIN_SERVER
EARLY_STOPPING: dict[bool | str, common_pb2.BeamParams.EarlyStopping] = {
    False: common_pb2.BeamParams.EARLY_STOPPING_HEURISTIC,
    True: common_pb2.BeamParams.EARLY_STOPPING_FIRST,
    "never": common_pb2.BeamParams.EARLY_STOPPING_NEVER,
}

_SERVER_DEFAULTS = Configuration(
    sampling=common_pb2.SamplingParams(
        temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, top_k=0, n=1, typical_p=1.0, no_repeat_ngram_size=0,
    ),
    stopping=common_pb2.StoppingParams(min_tokens=0, ignore_eos=False, include_stop=False),
    beams=common_pb2.BeamParams(num_beams=1, length_penalty=1.0, early_stopping=EARLY_STOPPING[False]),
)  # fmt: skip


def checkpoint_defaults(config: GenerationConfig) -> Configuration:
    """What a checkpoint says, and the server's defaults for the rest."""
    made = Configuration()
    made.CopyFrom(_SERVER_DEFAULTS)
    for part in ("sampling", "stopping", "beams"):
        fields = getattr(made, part)
        for field in fields.DESCRIPTOR.fields:
            path = f"{part}.{field.name}"
            made.origins[path] = SERVER
            value = getattr(config, field.name, None)
            if value is None or value == ():
                continue
            made.origins[path] = CHECKPOINT
            if field.name == "early_stopping":
                fields.early_stopping = EARLY_STOPPING[value]
            elif field.name == "bad_token_sequences":
                fields.bad_token_sequences.extend(common_pb2.TokenIds(ids=ids) for ids in value)
            else:
                setattr(fields, field.name, value)
    return made


def without_beams(made: Configuration) -> None:
    """Takes all that is said of beams from `made`."""
    made.ClearField("beams")
    for name in [name for name in made.origins if name.startswith("beams.")]:
        del made.origins[name]


def in_force(request: Any, defaults: Configuration) -> Configuration:
    """The request's own values over `defaults`; seed and max_tokens stay unset where nobody says them.

    Without beams (see `beams`).
    """
    made = Configuration()
    made.CopyFrom(defaults)
    without_beams(made)
    for part in ("sampling", "stopping"):
        given, fields = getattr(request, part), getattr(made, part)
        for field, _ in given.ListFields():
            made.origins[f"{part}.{field.name}"] = REQUEST
            if field.name == "bad_token_sequences":  # a list of the request's replaces the checkpoint's
                fields.ClearField(field.name)
        fields.MergeFrom(given)
    # A default that was meant for longer answers never contradicts what the request says.
    stopping = made.stopping
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        if made.origins["stopping.min_tokens"] == CHECKPOINT:
            stopping.min_tokens = stopping.max_tokens
        elif made.origins["stopping.max_tokens"] == CHECKPOINT:
            stopping.max_tokens = stopping.min_tokens
    return made
