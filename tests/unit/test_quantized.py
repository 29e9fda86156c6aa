"""8-bit products against their definition, and products of a fixed number of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.decoders import VARIANTS, write
from support.stack import CPU, Stack
from torch import Tensor

from salver.model.errors import CheckpointError
from salver.model.layers import product
from salver.model.loader import load_model
from salver.model.numerics import fixed_rows_hold, promise
from salver.model.quantized import FP8, QuantizedLinear, quantize, quantize_model


def definition(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """In float64: both sides rounded by their largest value, of a token and of a column."""

    def rounded(t: Tensor) -> Tensor:
        scale = t.double().abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)
        steps = t.double() / scale
        return (steps.round() if kind == "int8" else steps.float().to(FP8).double()) * scale

    return rounded(x) @ rounded(weight).T


@pytest.mark.parametrize(("kind", "loss"), [("int8", 0.02), ("fp8", 0.05)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_what_its_definition_says(kind: str, loss: float, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(rows, 64) * 3
    found = QuantizedLinear(weight, bias, kind)(x) - bias
    torch.testing.assert_close(found.double(), definition(x, weight, kind), rtol=0, atol=1e-3)
    whole = F.linear(x, weight)
    assert float((found - whole).norm() / whole.norm()) < loss


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tokens_do_not_know_one_another(kind: str) -> None:
    torch.manual_seed(0)
    linear = QuantizedLinear(torch.randn(32, 64).bfloat16(), None, kind)
    x = torch.randn(9, 64).bfloat16()
    x[3] *= 1000
    x[5] = 0
    together = linear(x)
    assert together.dtype == torch.bfloat16 and not together[5].any()
    if kind == "int8":  # sums of whole numbers: the same bits in any step
        for row in range(9):
            assert torch.equal(linear(x[row : row + 1])[0], together[row])
    values, scale = quantize(x, kind)
    for row in range(9):
        alone = quantize(x[row : row + 1], kind)
        assert torch.equal(alone[0].float()[0], values.float()[row]) and torch.equal(alone[1][0], scale[row])


def test_a_model_in_eight_bits_still_says_about_the_same(tmp_path: Path) -> None:
    write(tmp_path, VARIANTS["Llama plain"])
    whole = Stack(tmp_path).logits([5, 6, 7, 8, 9, 10])
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    before = sum(p.nbytes for p in model.layers.parameters())
    with pytest.raises(CheckpointError, match=r"--quantization fp8: layers\.0\.down.*multiples of 16"):
        quantize_model(load_model(tmp_path, device=CPU, dtype=torch.float32), "fp8")
    quantize_model(model, "int8")
    assert sum(t.nbytes for t in model.layers.buffers()) < before / 3
    stack = Stack(tmp_path)
    stack._hold(model, stack.cache)
    found = stack.logits([5, 6, 7, 8, 9, 10])
    assert float((found - whole).norm() / whole.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_a_fixed_number_of_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 32).to(dtype), torch.randn(24).to(dtype)
    for count in (1, 7, 16, 17, 50):
        x = torch.randn(count, 32).to(dtype)
        found = product(x, weight, bias, 16)
        assert found.shape == (count, 24)
        torch.testing.assert_close(found, F.linear(x, weight, bias))


def test_every_call_has_that_many_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a whole model, experts and head too."""
    write(tmp_path, VARIANTS["Mixtral plain"])
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    stack = Stack(tmp_path)
    stack._hold(model, stack.cache)
    expected = stack.logits([5, 6, 7, 8, 9])
    model.fix_rows(16)
    rows: set[int] = set()
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.add(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    torch.testing.assert_close(stack.logits([5, 6, 7, 8, 9]), expected, rtol=0, atol=1e-4)
    assert rows == {16}


def test_the_promise_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library whose rows differ by their place is found out."""
    write(tmp_path, VARIANTS["Llama plain"])
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    linear = F.linear

    def uneven(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        out[5] = out[5].nextafter(out[5] + 1)
        return out

    monkeypatch.setattr(F, "linear", uneven)
    assert not fixed_rows_hold(model, 16)
    # By halves of float64 no sum depends on its order here.
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: (x[:, None].double() * w).sum(-1).to(x.dtype))
    assert fixed_rows_hold(model, 16)
    assert promise("exact", torch.bfloat16, False, True) == "tokens"
    assert promise("exact", torch.bfloat16, False) == promise("fast", torch.bfloat16, False, True) == "none"
