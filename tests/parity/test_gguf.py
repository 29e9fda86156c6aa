"""The GGUF conversion against transformers' own GGUF loader, `tokenizers` and, where installed, llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from salver.model.chat_template import ChatTemplate
from salver.model.errors import CheckpointError
from salver.model.gguf import convert_gguf, main
from salver.model.tokenizer import Tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
MERGES = ["t h", "th e", "Ġ the", "1 2", "i n"]
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<user>",
]
TYPES = [3, 3, 3, *[1] * (256 + len(MERGES)), 4]
TEXTS = [
    "The answer is 12345, isn't it?  ok\n\n x 12 1200",
    "the in<|im_start|>user\nthe  the<|im_end|>\n<user> thin",
    "naïve 👩‍👩‍👧 ²³ ٣٤ ½ 日本語 \u00a0\u3000x\t\r\n",
    "I'LL we'll 'S ... ,,  ,a _b_ €5.99 -- 3rd",
    "",
    " ",
    "   \n  \n",
]
Change = Callable[[dict[str, Any], dict[str, Any]], None]


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    vocab = len(TOKENS)
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        found["output.weight"] = (vocab, HIDDEN)
    for layer in range(LAYERS):
        sizes = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        found |= {f"blk.{layer}.{name}.weight": size for name, size in sizes.items()}
    return found


def write_gguf(path: Path, change: Change = lambda fields, tensors: None, *, tied: bool = False) -> Path:
    """A random Llama, its tensors in turn of each type. `change` edits fields and float32 tensors first."""
    random = np.random.default_rng(0)
    fields: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    tensors: dict[str, Any] = {
        name: random.standard_normal(size, np.float32) * np.float32(0.2)
        for name, size in shapes(tied).items()
    }
    change(fields, tensors)
    types = gguf.GGMLQuantizationType
    cycle = [types.Q4_1, types.Q8_0, types.F16, types.BF16, types.F32]
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for name, value in fields.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    for index, (name, values) in enumerate(tensors.items()):
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        kind = cycle[index % len(cycle)]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equal_models(ours: Path, theirs: Path) -> Any:
    """The converted directory `ours` and transformers' reading of the file `theirs`; returns the first."""
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(
        theirs.parent, gguf_file=theirs.name, dtype=torch.float32
    ).eval()
    weights, expected = model.state_dict(), reference.state_dict()
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        assert torch.equal(values, expected[name]), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_every_type_of_tensor_equals_transformers(tmp_path: Path, tied: bool) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    convert_gguf(source, tmp_path / "out", "float32")
    model = assert_equal_models(tmp_path / "out", source)
    assert model.config.tie_word_embeddings is tied
    assert model.config.rope_parameters == {"rope_theta": 50000.0, "rope_type": "default"}
    assert model.config.rms_norm_eps == 1e-5 and model.config.max_position_embeddings == 128
    assert model.generation_config.eos_token_id == [2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_round_as_torch_does(tmp_path: Path, dtype: str) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(source, tmp_path / "wide", "float32")
    convert_gguf(source, tmp_path / "half", dtype)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    for name, values in half.items():
        assert values.dtype == getattr(torch, dtype)
        assert torch.equal(values, wide[name].to(values.dtype)), name


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(source, tmp_path / "a", "bfloat16")
    assert main([str(source), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    assert set(manifest) == set(names) - {"manifest.json"}


def test_llama3_rope_scaling_and_biases(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=131072)
    config.rope_parameters = {**scaling, "rope_theta": 50000.0}
    plain = 50000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = plain / LlamaRotaryEmbedding(config).inv_freq.double().numpy()

    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
        for layer in range(LAYERS):
            for name, size in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("output", HIDDEN)):
                tensors[f"blk.{layer}.attn_{name}.bias"] = np.arange(size, dtype=np.float32)

    convert_gguf(write_gguf(tmp_path / "tiny.gguf", change), tmp_path / "out", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters == {**scaling, "rope_theta": 50000.0}
    bias = model.state_dict()["model.layers.1.self_attn.q_proj.bias"]
    half = torch.arange(0, HEAD_DIM, 2)
    assert bias[:HEAD_DIM].tolist() == [*half.tolist(), *(half + 1).tolist()]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_tokenizers_of_every_kind(tmp_path: Path, pre: str) -> None:
    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        fields["tokenizer.ggml.pre"] = pre

    convert_gguf(write_gguf(tmp_path / "tiny.gguf", change), tmp_path, "bfloat16")
    tokenizer = Tokenizer.from_directory(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text).input_ids
        bare = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ([1, *bare] if pre == "llama-bpe" else bare)
        assert tokenizer.decode(bare, skip_special_tokens=False) == text
    pieces = [tokenizer.token(i) for i in tokenizer.encode("the 1200", add_special_tokens=False)]
    digits = {
        "smollm": ["Ġ", "1", "2", "0", "0"],
        "gpt-2": ["Ġ", "12", "0", "0"],
        "llama-bpe": ["Ġ", "12", "0", "0"],
        "qwen2": ["Ġ", "1", "2", "0", "0"],
    }
    assert pieces == ["the", *digits[pre]]
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.encode("<user>", add_special_tokens=False) == [len(TOKENS) - 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def edit(name: str, value: Any) -> Change:
    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        target = tensors if name.endswith((".weight", ".bias")) else fields
        if value is None:
            del target[name]
        else:
            target[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("general.architecture", "gpt2", "general.architecture is 'gpt2'"),
        ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model is 'llama'"),
        ("tokenizer.ggml.pre", "deepseek-llm", "tokenizer.ggml.pre is 'deepseek-llm'"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre is missing"),
        ("tokenizer.ggml.tokens", TOKENS[:-1], "token_type has"),
        ("tokenizer.ggml.tokens", [*TOKENS[:-1], "the"], "'the' twice"),
        ("tokenizer.ggml.merges", ["t h", "the x"], "merges has 'the x'"),
        ("tokenizer.ggml.eos_token_id", 10_000, "eos_token_id is 10000"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.block_count", "two", "llama.block_count is 'two'"),
        ("llama.block_count", 3, "tensor blk.2.attn_norm.weight is missing"),
        ("llama.expert_count", 8, "llama.expert_count is not implemented"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count differs"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type is 'yarn'"),
        ("rope_freqs.weight", np.full(HEAD_DIM // 2, 2, np.float32), "rope_freqs.weight is not"),
        ("blk.1.ffn_up.weight", None, "tensor blk.1.ffn_up.weight is missing"),
        ("blk.0.attn_q_norm.weight", np.zeros(16, np.float32), "tensor blk.0.attn_q_norm.weight is not one"),
        ("blk.0.attn_q.weight", np.zeros((32, HIDDEN), np.float32), "blk.0.attn_q.weight has shape"),
        ("blk.0.attn_norm.weight", np.full(HIDDEN, 1e30, np.float32), "blk.0.attn_norm.weight has values"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", edit(name, value))
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(source, tmp_path / "out", "float16")
    assert message in str(caught.value) and str(source) in str(caught.value)


def test_truncated_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    whole = source.read_bytes()
    for size in [0, 3, 4, 10, *range(24, len(whole), 3001), len(whole) - 40]:
        source.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|cannot read"):
            convert_gguf(source, tmp_path / "out", "float32")
    for content, message in (
        (b"GGML" + whole[4:], "not a GGUF file"),
        (whole[:4] + b"\x01\0\0\0" + whole[8:], "GGUF version 1"),
        (whole[:24] + b"\xff" * 8 + whole[32:], "the name of a metadata field runs to byte"),
    ):
        source.write_bytes(content)
        assert main([str(source), str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the real model ----


def test_smollm2_equals_transformers(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    model = assert_equal_models(smollm2_checkpoint, smollm2_gguf)
    assert model.num_parameters() == 134_515_008


def test_smollm2_tokenizes_as_its_kind_does(smollm2_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_directory(smollm2_checkpoint)
    reference = AutoTokenizer.from_pretrained(smollm2_checkpoint)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # Every digit is a token of its own, whatever stands around it.
    ids = tokenizer.encode("In 2024, 12345 of 1,000,000")
    assert all(sum(c.isdigit() for c in tokenizer.token(i) or "") <= 1 for i in ids)
    chat = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate.from_directory(smollm2_checkpoint)
    assert template is not None
    rendered = template.render(chat)
    assert rendered == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(rendered, add_special_tokens=False)[-4:] == [1, *tokenizer.encode("assistant\n")]


def test_smollm2_tokenizes_as_llama_cpp_does(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    peer = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.from_directory(smollm2_checkpoint)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer.tokenize(text.encode(), add_bos=False, special=True), text
