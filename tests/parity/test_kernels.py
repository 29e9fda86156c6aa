"""The native kernel agrees with plain torch, and a row's bits don't depend on its company."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from support.stack import CPU, Stack

from salver.model.attention.reference import ReferenceAttention
from salver.model.cache import KVCache
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.kernels.library import (
    INT4_BLOCK,
    INT4_BYTES,
    PANEL,
    CBuffer,
    CWeight,
    Library,
    Precision,
    num_panels,
)
from salver.model.kernels.program import NativeTransformer
from salver.model.spec import LearnedPositions, ModelSpec, NormSpec, RopePositions, WeightMap
from salver.model.transformer import Layer, Transformer

VOCABULARY, CONTEXT = 149, 512
BLOCKS, BLOCK_SIZE = 160, 16


class Way(NamedTuple):
    """In which precision is multiplied, and whether bf16 by pairs, whatever this processor would choose."""

    precision: Precision
    pairs: bool

    def __str__(self) -> str:
        return self.precision.name.lower() + (" by pairs" if self.pairs else "")


WAYS = [
    Way(Precision.FLOAT32, False),
    Way(Precision.BFLOAT16, False),
    Way(Precision.BFLOAT16, True),
    Way(Precision.INT8, False),
    Way(Precision.INT4, False),
]
# Of logits whose largest are about 10: float32 by rounding alone; the others by what they round to.
TOLERANCES = {Precision.FLOAT32: 2e-3, Precision.BFLOAT16: 0.5, Precision.INT8: 2.0, Precision.INT4: 2.0}


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Library:
    try:
        return Library(build.find_or_build(cache_dir))
    except KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")


def spec(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "architecture": "Random",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 100,
        "max_position_embeddings": CONTEXT,
        "norm": NormSpec("rms", 1e-5),
        "positions": RopePositions(10000.0),
        "activation": "silu",
        "gated": True,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tied_head": True,
        "weights": WeightMap(),
    }
    return ModelSpec(**{**fields, **changes})


LAYER_NORM: dict[str, Any] = {
    "norm": NormSpec("layer", 1e-5),
    "positions": LearnedPositions(),
    "gated": False,
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}
SPECS = {
    "llama": spec(),
    "untied": spec(tied_head=False),
    "gpt2": spec(**LAYER_NORM, activation="gelu_new", num_kv_heads=6),
    "gelu": spec(**LAYER_NORM, activation="gelu", head_dim=16),
    "relu": spec(**LAYER_NORM, activation="relu", tied_head=False, hidden_size=100),
    "biases and a gate": spec(qkv_bias=True, attention_out_bias=True, mlp_bias=True, activation="gelu"),
    "one key head": spec(num_heads=7, num_kv_heads=1, head_dim=48),
    "heads of 64": spec(num_heads=3, num_kv_heads=3, head_dim=64, hidden_size=192),
    "heads of 80": spec(num_heads=4, head_dim=80, intermediate_size=516),
    "heads of 128": spec(num_heads=2, num_kv_heads=1, head_dim=128, num_layers=1),
    "heads of 256": spec(num_heads=2, num_kv_heads=1, head_dim=256, num_layers=1),
}


def spec_for(name: str, way: Way) -> ModelSpec:
    """int4 wants blocks of 32 in every depth."""
    of = SPECS[name]
    if way.precision is not Precision.INT4:
        return of
    heads = next(count for count in range(of.num_heads, 0, -1) if count * of.head_dim % INT4_BLOCK == 0)
    sizes = {n: -(-getattr(of, n) // INT4_BLOCK) * INT4_BLOCK for n in ("hidden_size", "intermediate_size")}
    return replace(of, num_heads=heads, num_kv_heads=min(of.num_kv_heads, heads), **sizes)


def in_blocks(weight: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """A weight as a GGUF file of this type holds it."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))


def random_model(of: ModelSpec, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(of, ReferenceAttention())
    model.place(CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if "bias" in name else 1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.7 * parameter.shape[1] ** -0.5)
        model.embed.weight.normal_(0.0, 1.0)
    return model.to(dtype)


def native_of(model: Transformer, library: Library, way: Way, threads: int = 2) -> Stack:
    """Takes the model, which must have float32 weights."""
    dtype = torch.float32 if way.precision is Precision.FLOAT32 else torch.bfloat16
    cache = KVCache(model.spec, BLOCKS, BLOCK_SIZE, dtype=dtype, device=CPU)
    return Stack.of(
        NativeTransformer(
            model.to(dtype), cache, library, precision=way.precision, threads=threads, pairs=way.pairs
        ),
        cache,
    )


def model_for(name: str, way: Way) -> Transformer:
    """What 4 bits lose of weights is not the kernel's: those of int4 lie on a lattice already."""
    model = random_model(spec_for(name, way))
    if way.precision is Precision.INT4:
        for layer in model.layers:
            assert isinstance(layer, Layer)
            for module in (layer.qkv, layer.attention_out, layer.up, layer.down):
                weight = in_blocks(module.weight.detach(), gguf.GGMLQuantizationType.Q4_1)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def native(name: str, library: Library, way: Way, threads: int = 2) -> Stack:
    return native_of(model_for(name, way), library, way, threads)


def reference(name: str, way: Way) -> Stack:
    model = model_for(name, way)
    return Stack.of(model, KVCache(model.spec, BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=CPU))


Cut = list[list[tuple[int, int]]]  # of each step: which sequence, how many of its tokens


def random_cut(draw: random.Random, lengths: list[int]) -> Cut:
    """Sequences come in any order, in chunks of any size, some steps apart."""
    left = dict(enumerate(lengths))
    steps: Cut = []
    while left:
        chosen = draw.sample(sorted(left), draw.randint(1, len(left)))
        step = []
        for sequence in chosen:
            most = left[sequence]
            size = 1 if draw.random() < 0.4 else draw.randint(1, most)
            step.append((sequence, size))
            left[sequence] -= size
            if not left[sequence]:
                del left[sequence]
        steps.append(step)
    return steps


def run(stack: Stack, tokens: list[list[int]], steps: Cut) -> list[torch.Tensor]:
    """The logits [n, vocab] of each sequence, cut as said."""
    found: list[list[torch.Tensor]] = [[] for _ in tokens]
    for number, step in enumerate(steps):
        parts = []
        for sequence, size in step:
            begin = sum(len(rows) for rows in found[sequence])
            parts.append((sequence, tokens[sequence][begin : begin + size]))
        for (sequence, _), logits in zip(parts, stack.step(parts, padding=number % 3), strict=True):
            found[sequence].append(logits)
    for sequence in range(len(tokens)):
        stack.end(sequence)
    return [torch.cat(rows) for rows in found]


def random_tokens(draw: random.Random, lengths: list[int]) -> list[list[int]]:
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_agrees_with_torch(library: Library, name: str, way: Way) -> None:
    draw = random.Random(1)
    lengths = [1, 7, 70, 150]
    tokens, steps = random_tokens(draw, lengths), random_cut(draw, lengths)
    expected = run(reference(name, way), tokens, steps)
    for ours, theirs in zip(run(native(name, library, way), tokens, steps), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCES[way.precision], rtol=1e-4)


def mixes(stack: Stack, count: int, seed: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """(logits of sequences alone and whole, the same in a random mix)."""
    draw = random.Random(seed)
    for _ in range(count):
        lengths = [draw.choice((1, 2, 15, 16, 17, 40, 63, 64, 65, 130)) for _ in range(draw.randint(1, 5))]
        tokens = random_tokens(draw, lengths)
        alone = [run(stack, [one], [[(0, len(one))]])[0] for one in tokens]
        yield alone, run(stack, tokens, random_cut(draw, lengths))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_bits_in_any_mix(library: Library, name: str, way: Way) -> None:
    mixed = 0
    for alone, together in mixes(native(name, library, way), 34, seed=len(name)):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        mixed += 1
    assert mixed == 34  # six times: some two hundred


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_bits_on_any_number_of_threads(library: Library, way: Way) -> None:
    draw = random.Random(2)
    lengths = [3, 90, 33]
    tokens, steps = random_tokens(draw, lengths), random_cut(draw, lengths)
    one, three = (run(native("llama", library, way, n), tokens, steps) for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_bf16_weights_multiply_as_the_floats_that_they_are(library: Library) -> None:
    stacks = []
    for way in (Way(Precision.FLOAT32, False), Way(Precision.BFLOAT16, False)):
        model = random_model(SPECS["untied"])
        assert model.head is not None
        model.head.to(torch.bfloat16).to(torch.float32)
        stacks.append(native_of(model, library, way))
    hidden = torch.randn(17, SPECS["untied"].hidden_size)
    float32, bfloat16 = (stack.model.logits(hidden) for stack in stacks)
    assert torch.equal(float32, bfloat16)


class Int8Rows:
    """Room for int8 rows as the kernel keeps them, one scale for each group."""

    def __init__(self, rows: int, depth: int, group: int) -> None:
        self.values = torch.zeros((rows, depth), dtype=torch.int8)
        self.scales = torch.zeros((-(-depth // group), rows))
        self.sums = torch.zeros_like(self.scales)
        self.offsets = torch.zeros(rows)
        self.buffer = CBuffer(
            data=self.values.data_ptr(), stride=depth, precision=Precision.INT8, width=depth,
            group_scale=self.scales.data_ptr(), row_offset=self.offsets.data_ptr(), scale_stride=rows,
            group=group, group_sum=self.sums.data_ptr(),
        )  # fmt: skip


def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a b + c of float32, rounded once."""
    return (a.double() * b.double() + c.double()).float()


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("depth", [4, 64, 100, 128, 196, 516])
def test_int8_products_are_those_of_the_same_arithmetic(library: Library, depth: int, group: int) -> None:
    """Each group's integers, scaled and added from front to back: to the bit, for every number of rows."""
    torch.manual_seed(depth)
    weight, columns = torch.randn(5 * PANEL + 7, depth), 5 * PANEL + 7
    packed, column_scale = library.pack(weight, Precision.INT8, gated=False, threads=1)
    of = CWeight(
        data=packed.data_ptr(), column_scale=column_scale.data_ptr(), precision=Precision.INT8,
        rows=columns, depth=depth, panels=num_panels(columns, gated=False),
    )  # fmt: skip
    integers = (weight * (127 / weight.abs().amax(1, keepdim=True))).round().long() + 128
    x = torch.randn(29, depth) * torch.logspace(-2, 2, depth)
    x[3] = 0.0
    for count in (*range(1, 14), 29):
        rows = Int8Rows(count, depth, group)
        library.put_rows(rows.buffer, x, torch.arange(count))
        offsets = torch.zeros(count)
        parts = []
        for number, begin in enumerate(range(0, depth, group)):
            some = x[:count, begin : begin + group]
            highest = some.abs().amax(1)
            values = (some * torch.where(highest > 0, 127 / highest, 0.0)[:, None]).round().to(torch.int8)
            assert torch.equal(rows.values[:, begin : begin + group], values)
            assert torch.equal(rows.scales[number], highest / 127)
            offsets = fused(-128.0 * values.sum(1).float(), rows.scales[number], offsets)
            parts.append(values.long() @ integers[:, begin : begin + group].T)
        assert torch.equal(rows.offsets, offsets)
        sums = offsets[:, None].expand(count, columns)
        for scale, part in zip(rows.scales, parts, strict=True):
            sums = fused(part.float(), scale[:, None], sums)
        out = torch.empty(count, columns)
        library.multiply(rows.buffer, of, out, threads=2)
        assert torch.equal(out, sums * column_scale[:columns])


def unpacked(packed: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 scale [columns, blocks], least [columns, blocks] and values [columns, depth] of int4 panels."""
    blocks = packed.view(packed.shape[0], -1, PANEL * INT4_BYTES)
    numbers = blocks[..., PANEL * 16 :].contiguous().view(torch.float16).float()
    scale, least = (n.transpose(1, 2).flatten(0, 1)[:columns] for n in numbers.split(PANEL, dim=2))
    nibbles = blocks[..., : PANEL * 16].unflatten(2, (4, PANEL, 4))  # 8 of depth, column, byte
    values = torch.stack((nibbles & 0x0F, nibbles >> 4), dim=4)  # low halves, and what is 4 deeper
    values = values.permute(0, 3, 1, 2, 4, 5).flatten(2).flatten(0, 1)
    return scale, least, values[:columns].float()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("depth", [32, 96, 288])
def test_int4_products_are_those_of_the_blocks_of_a_gguf_file(
    library: Library, kind: str, depth: int
) -> None:
    """The weights are those of the file, to the bit; and products as with int8."""
    torch.manual_seed(depth)
    columns, of_kind = 5 * PANEL + 7, gguf.GGMLQuantizationType[kind]
    weight = torch.randn(columns, depth) * torch.logspace(-3, 1, columns)[:, None]
    weight[3, :INT4_BLOCK] = 0.0
    weight = in_blocks(weight, of_kind)
    packed, _ = library.pack(weight, Precision.INT4, gated=False, threads=2)
    scale, least, integers = unpacked(packed, columns)
    again = scale[..., None] * integers.unflatten(1, (-1, INT4_BLOCK)) + least[..., None]
    assert torch.equal(again.flatten(1), weight)
    of = CWeight(
        data=packed.data_ptr(), precision=Precision.INT4, rows=columns, depth=depth,
        panels=num_panels(columns, gated=False),
    )  # fmt: skip
    x = torch.randn(29, depth) * torch.logspace(-2, 2, depth)
    x[3] = 0.0
    for count in (*range(1, 14), 29):
        rows = Int8Rows(count, depth, INT4_BLOCK)
        library.put_rows(rows.buffer, x, torch.arange(count))
        sums = torch.zeros(count, columns)
        for number, begin in enumerate(range(0, depth, INT4_BLOCK)):
            values = rows.values[:, begin : begin + INT4_BLOCK].float()
            assert torch.equal(rows.sums[number], values.sum(1) * rows.scales[number])
            part = values @ integers[:, begin : begin + INT4_BLOCK].T  # exact: small integers
            sums = fused(least[:, number], rows.sums[number][:, None], sums)
            sums = fused(part * scale[:, number], rows.scales[number][:, None], sums)
        out = torch.empty(count, columns)
        library.multiply(rows.buffer, of, out, threads=2)
        assert torch.equal(out, sums)


def test_what_lies_on_no_lattice_is_rounded_as_well_as_ggml_does(library: Library) -> None:
    """Products with the unit vectors show the packed weight."""
    torch.manual_seed(1)
    weight = torch.randn(64, 128)
    packed, _ = library.pack(weight, Precision.INT4, gated=False, threads=1)
    of = CWeight(data=packed.data_ptr(), precision=Precision.INT4, rows=64, depth=128, panels=2)
    rows, out = Int8Rows(128, 128, INT4_BLOCK), torch.empty(128, 64)
    library.put_rows(rows.buffer, torch.eye(128), torch.arange(128))
    library.multiply(rows.buffer, of, out, threads=1)
    error, theirs = (out.T - weight).pow(2).sum(), []
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1):
        theirs.append((in_blocks(weight, kind) - weight).pow(2).sum())
    assert error <= min(theirs) * 1.001


def test_an_outlier_costs_its_own_group_alone(library: Library) -> None:
    x = torch.randn(1, 192)
    plain, spoiled = Int8Rows(1, 192, 64), Int8Rows(1, 192, 64)
    library.put_rows(plain.buffer, x, torch.zeros(1, dtype=torch.int64))
    x[0, 70] = 1e4
    library.put_rows(spoiled.buffer, x, torch.zeros(1, dtype=torch.int64))
    same = (plain.values == spoiled.values)[0]
    assert same[:64].all() and same[128:].all() and not same[64:128].all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_not_a_number_stays_in_its_sequence(library: Library, way: Way) -> None:
    model = random_model(spec_for("untied", way))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[5] = float("nan")
    rows = []
    for one in (model, broken):
        stack = native_of(one, library, way)
        rows.append(stack.step([(0, [1, 2, 3]), (1, [4, 5, 6]), (2, [7])]))
        # The blocks of the broken one, used again, are as good as new.
        stack.end(1)
        rows.append(stack.step([(3, [8] * 20)]))
    assert torch.equal(rows[0][0], rows[2][0]) and torch.equal(rows[0][2], rows[2][2])
    assert rows[2][1][1:].isnan().all()
    assert torch.equal(rows[1][0], rows[3][0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 24}, "24"),
        ({"intermediate_size": 102}, "102"),
        ({"head_dim": 272}, "272"),
        ({"precision": Precision.INT4}, "width of 100 is not a multiple of 32"),
    ],
)
def test_what_it_does_not_know_is_refused_untouched(
    library: Library, change: dict[str, Any], word: str
) -> None:
    precision = change.pop("precision", Precision.FLOAT32)
    model = random_model(spec(**change))
    cache = KVCache(model.spec, 4, BLOCK_SIZE, dtype=torch.float32, device=CPU)
    with pytest.raises(KernelUnavailable, match=word):
        NativeTransformer(model, cache, library, precision=precision, threads=1)
    assert model.embed.weight.numel() == VOCABULARY * model.spec.hidden_size


# ---- building ----


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_processor", lambda: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelUnavailable, match="no C\\+\\+ compiler"):
        build.find_or_build(tmp_path)


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_processor", lambda: None)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'step.cpp:1: error: too modern' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelUnavailable, match="too modern"):
        build.find_or_build(tmp_path)
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["lock"]


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PROCESSOR_FEATURES", ("avx512f", "avx1024"))
    with pytest.raises(KernelUnavailable, match=r"avx1024|x86-64"):
        build.check_processor()


def test_another_librarys_file(tmp_path: Path) -> None:
    (tmp_path / "kernel.so").write_bytes(b"not a library")
    with pytest.raises(KernelUnavailable, match=r"kernel\.so"):
        Library(tmp_path / "kernel.so")
