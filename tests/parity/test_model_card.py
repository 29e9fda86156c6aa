"""The model card's arithmetic against what a started engine holds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.encoders import write_encoder
from support.seq2seq import VARIANTS as SEQ2SEQ
from support.seq2seq import write as write_seq2seq

from salver.model.arithmetic import Arithmetic, Storage
from salver.model.config_reader import FieldsRead
from salver.model.encoder_config import read_any_spec
from salver.model.generation_config import GenerationConfig
from salver.model.hyperparameters import Hyperparameter, Source, hyperparameters
from salver.model.kernels.build import KernelUnavailable, find_or_build
from salver.server.engine.config import EngineConfig
from salver.server.engine.encoder_startup import start_any_engine
from salver.server.engine.request import Ready
from salver.server.engine.status_page import StatusPage
from salver.server.rpc.model_card import storage_of


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> str:
    try:
        return str(find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(str(error))


def start(checkpoint: Path, library: str, **fields: str) -> Ready:
    config = EngineConfig(
        str(checkpoint), device="cpu", kernels="native" if library else "torch", kernel_library=library,
        threads=1, **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    page = StatusPage.create()
    try:
        return start_any_engine(config, page, [], time.perf_counter())[1]
    finally:
        page.close()


def assert_predicted(checkpoint: Path, ready: Ready) -> None:
    """Within 2% of the storages that the worker counted."""
    assert ready.measured is not None
    spec = read_any_spec(checkpoint)
    predicted = storage_of(ready).total(ready.measured.tensors, spec)
    assert predicted == pytest.approx(ready.measured.weight_bytes, rel=0.02)
    assert sum(tensor.size for tensor in ready.measured.tensors) == ready.num_parameters
    assert ready.measured.roofline.bytes_per_second > 0 < ready.measured.roofline.operations_per_second


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int4")],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_weights_are_predicted(
    name: str, dtype: str, quantization: str, tiny_llama: Path, tiny_gpt2: Path, library: str
) -> None:
    checkpoint = tiny_llama if name == "llama" else tiny_gpt2
    ready = start(checkpoint, library, dtype=dtype, quantization=quantization)
    assert ready.kernels == "native"
    assert_predicted(checkpoint, ready)


def test_plain_weights_are_predicted(tiny_llama: Path) -> None:
    assert_predicted(tiny_llama, start(tiny_llama, "", dtype="bfloat16"))


@pytest.mark.parametrize("way", ["torch", "products alone", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "AlbertForSequenceClassification", "ModernBertForTokenClassification"]
)
def test_an_encoders_weights_are_predicted(name: str, way: str, tmp_path: Path, library: str) -> None:
    """Heads of 12 are none that the kernel knows: it computes the products alone."""
    heads = {} if way in ("torch", "products alone") else {"num_attention_heads": 3}
    checkpoint = write_encoder(tmp_path, name, **heads)
    dtype, quantization = {"bfloat16": ("bfloat16", "none"), "int8": ("float32", "int8")}.get(
        way, ("float32", "none")
    )
    ready = start(checkpoint, library if way != "torch" else "", dtype=dtype, quantization=quantization)
    assert ready.kernels == ("torch" if way == "torch" else "native")
    assert_predicted(checkpoint, ready)


@pytest.mark.parametrize("way", ["torch", "products alone"])
def test_keys_and_queries_of_distances_are_counted(way: str, tmp_path: Path, library: str) -> None:
    checkpoint = write_encoder(tmp_path, "DebertaV2ForSequenceClassification")
    assert_predicted(checkpoint, start(checkpoint, library if way != "torch" else ""))


@pytest.mark.parametrize("way", ["torch", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["Marian paper", "Marian own", "T5 flan", "UMT5 plain"])
def test_an_encoder_decoders_weights_are_predicted(name: str, way: str, tmp_path: Path, library: str) -> None:
    sizes = {
        "d_model": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "d_kv": 16,
        "d_ff": 64,
    }
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = SEQ2SEQ[name].config
    known = {field: size for field, size in sizes.items() if field in config}
    write_seq2seq(tmp_path, replace(SEQ2SEQ[name], config={**config, **known}))
    dtype = "float32" if way in ("torch", "int8") else "bfloat16"
    fields = {"dtype": "float32" if way == "float32" else dtype}
    if way in ("int8", "int4"):
        fields["quantization"] = way
    ready = start(tmp_path, library if way != "torch" else "", **fields)
    assert ready.kernels == ("torch" if way == "torch" else "native")
    assert_predicted(tmp_path, ready)


def test_operations_are_those_of_the_products(tiny_llama: Path) -> None:
    """Counted by hand: 2 layers, hidden 64, inner 128, 4 query and 2 key heads of 16."""
    ready = start(tiny_llama, "", dtype="float32")
    assert ready.measured is not None
    spec = read_any_spec(tiny_llama)
    arithmetic = Arithmetic(spec, ready.measured.tensors, Storage(), "float32")
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    head = 64 * spec.vocab_size
    decode = arithmetic.decode(100)
    assert decode is not None
    assert decode.operations == 2 * (2 * layer + head) + 2 * 4 * 100 * 64
    norms = 5 * 64
    assert arithmetic.kv_bytes_per_token == 2 * 2 * 32 * 4
    assert decode.nbytes == 4 * (2 * layer + head + norms) + 100 * arithmetic.kv_bytes_per_token
    prefill = arithmetic.prefill(100, 50)
    assert prefill.operations == 2 * 2 * layer + 2 * head / 100 + 2 * 4 * 50.5 * 64
    assert prefill.nbytes == sum(tensor.nbytes for tensor in ready.measured.tensors) / 50


def test_hyperparameters_say_where_they_come_from(tiny_gpt2: Path, tiny_llama: Path) -> None:
    def found(checkpoint: Path) -> dict[str, Hyperparameter]:
        fields = FieldsRead()
        spec = read_any_spec(checkpoint, fields)
        generation = GenerationConfig(top_k=7, max_tokens=9)
        return {each.name: each for each in hyperparameters(spec, fields, generation)}

    gpt2, llama = found(tiny_gpt2), found(tiny_llama)
    assert gpt2["hidden_size"] == Hyperparameter("hidden_size", 64, Source.CONFIG, "n_embd")
    assert gpt2["intermediate_size"] == Hyperparameter("intermediate_size", 256, Source.FAMILY, "n_inner")
    assert gpt2["head_dim"].source is Source.DERIVED
    assert gpt2["norm.eps"].field == "layer_norm_epsilon" and gpt2["norm.eps"].source is Source.CONFIG
    assert llama["num_kv_heads"] == Hyperparameter("num_kv_heads", 2, Source.CONFIG, "num_key_value_heads")
    assert llama["gated"] == Hyperparameter("gated", True, Source.FAMILY)
    assert llama["eos_token_ids"].source is Source.GENERATION_CONFIG
    assert llama["max_tokens"] == Hyperparameter("max_tokens", 9, Source.GENERATION_CONFIG, "max_new_tokens")
    assert not {"rms_norm_eps", "n_embd", "eos_token_id"} & (llama.keys() | gpt2.keys())
