"""GetModelCard of real servers, and `salver card`."""

from __future__ import annotations

import json
import subprocess

import pytest
from support.serving import SALVER, Server

from salver.client import Client, InvalidArgument, NotFound, OutOfRange


def command(server: Server, *arguments: str) -> str:
    done = subprocess.run(
        [SALVER, "card", "--address", server.address, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_of_a_tiny_model(tiny: Server) -> None:
    with Client(tiny.address) as client:
        card = client.model_card(context=100)
        assert client.model_card().context == 512, "the whole context, which is below the default"
        with pytest.raises(OutOfRange, match="512"):
            client.model_card(context=513)
        with pytest.raises(InvalidArgument, match="context"):
            client.model_card(context=0)
        with pytest.raises(NotFound):
            client.model_card("another")
    assert sum(part.weights + part.biases for part in card.parameters) == card.model.num_parameters
    qkv = next(tensor for tensor in card.tensors if tensor.name == "layers.1.qkv.weight")
    assert qkv.checkpoint_names == tuple(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    assert qkv.shape == (64 + 2 * 32, 64) and qkv.part == "attention"
    memory = card.memory
    assert memory.predicted_weight_bytes == pytest.approx(memory.held_weight_bytes, rel=0.02)
    assert memory.sequences == memory.kv_cache_tokens // 112, "7 blocks of 16 each"
    assert memory.kv_cache_bytes == (memory.kv_cache_tokens + 16) * memory.kv_bytes_per_token
    by_name = {each.name: each for each in card.hyperparameters}
    assert (by_name["num_layers"].value, by_name["num_layers"].field) == (2, "num_hidden_layers")


def test_the_speeds_come_from_the_steps(tiny: Server) -> None:
    for _ in range(2):
        tiny.generate("the cat", max_tokens=16, ignore_eos=True)
    with Client(tiny.address) as client:
        speed = client.model_card(context=32).speed
        short = client.model_card(context=1).speed
    assert speed.decode_bound and speed.decode_warm_up and speed.decode_measured
    # No bound is below what the device has done.
    assert short.decode_bound and short.decode_warm_up and short.decode_measured
    assert short.decode_bound >= 0.999 * max(short.decode_warm_up, short.decode_measured)
    assert speed.decode_operations and speed.prefill_operations < speed.decode_operations


def test_the_memory_of_a_real_model_is_predicted(server: Server) -> None:
    with Client(server.address) as client:
        card = client.model_card()
    assert card.model.num_parameters == 134_515_008
    memory = card.memory
    assert memory.predicted_weight_bytes == pytest.approx(memory.held_weight_bytes, rel=0.02)
    assert card.speed.decode_operations == pytest.approx(2 * 134_515_008 + 4 * 1024 * 576 * 30, rel=0.001)


def test_the_command_prints_a_page_and_json(tiny: Server) -> None:
    page = command(tiny, "--context", "64", "--tensors")
    for text in (
        "Parameters",
        "layers.0.qkv.weight",
        "num_hidden_layers",
        "Memory",
        "sequences of 64 tokens",
    ):
        assert text in page
    card = json.loads(command(tiny, "--json"))
    assert card["memory"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
