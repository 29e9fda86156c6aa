"""What a checkpoint's generation_config.json says, and what is in force for a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salver.model.errors import CheckpointError
from salver.model.generation_config import GenerationConfig
from salver.server.rpc.configuration import CHECKPOINT, REQUEST, SERVER, checkpoint_defaults, in_force
from salver.v1 import common_pb2, generation_pb2


def read(directory: Path, **values: Any) -> GenerationConfig:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return GenerationConfig.from_directory(directory)


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert GenerationConfig.from_directory(tmp_path) == GenerationConfig()


def test_what_it_says(tmp_path: Path) -> None:
    config = read(
        tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=30, min_new_tokens=2,
        bad_words_ids=[[5], [6, 7], [1]], suppress_tokens=[9], eos_token_id=[1, 2], num_beams=4, top_h=None,
        epsilon_cutoff=0.0, transformers_version="5",
    )  # fmt: skip
    assert (config.temperature, config.top_k, config.top_p) == (0.6, 20, 0.95)
    assert (config.max_tokens, config.min_tokens) == (30, 2)
    assert config.bad_token_sequences == ((5,), (6, 7), (9,)), "but for an end of sequence, as transformers"
    assert config.ignored == ("num_beams",)
    assert read(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "warm"}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 1.5},
        {"top_k": True},
        {"max_new_tokens": 0}, {"bad_words_ids": [5]}, {"bad_words_ids": [[-5]]}, {"suppress_tokens": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(values))):
        read(tmp_path, **values)


def test_every_value_and_its_origin() -> None:
    config = GenerationConfig(temperature=0.5, top_k=20, bad_token_sequences=((5, 6),), min_tokens=8)
    defaults = checkpoint_defaults(config)
    request = generation_pb2.GenerateRequest(
        sampling=common_pb2.SamplingParams(temperature=0.0, top_p=0.5),
        stopping=common_pb2.StoppingParams(stop=["x"]),
    )
    found = in_force(request, defaults)
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.top_p) == (0.0, 20, 0.5)
    assert found.sampling.repetition_penalty == 1.0 and found.sampling.HasField("repetition_penalty")
    assert [list(word.ids) for word in found.sampling.bad_token_sequences] == [[5, 6]]
    origins = dict(found.origins)
    assert {name for name, origin in origins.items() if origin == REQUEST} == {
        "sampling.temperature", "sampling.top_p", "stopping.stop",
    }  # fmt: skip
    assert {name for name, origin in origins.items() if origin == CHECKPOINT} == {
        "sampling.top_k", "sampling.bad_token_sequences", "stopping.min_tokens",
    }  # fmt: skip
    assert origins["sampling.seed"] == SERVER
    fields = len(common_pb2.SamplingParams.DESCRIPTOR.fields) + len(
        common_pb2.StoppingParams.DESCRIPTOR.fields
    )
    assert len(origins) == fields
    assert defaults.sampling.temperature == 0.5, "the next request finds them as they were"


def test_a_request_replaces_a_list_and_outweighs_a_default() -> None:
    defaults = checkpoint_defaults(GenerationConfig(bad_token_sequences=((5, 6),), min_tokens=8))
    request = generation_pb2.GenerateRequest(stopping=common_pb2.StoppingParams(max_tokens=3))
    request.sampling.bad_token_sequences.add(ids=[9])
    found = in_force(request, defaults)
    assert [list(word.ids) for word in found.sampling.bad_token_sequences] == [[9]]
    assert (found.stopping.min_tokens, found.stopping.max_tokens) == (3, 3)
    defaults = checkpoint_defaults(GenerationConfig(max_tokens=5))
    request = generation_pb2.GenerateRequest(stopping=common_pb2.StoppingParams(min_tokens=7))
    assert in_force(request, defaults).stopping.max_tokens == 7
