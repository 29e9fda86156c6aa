"""The parts of a block: norms, linear maps, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import NormSpec


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), which GPT-2 calls gelu_new."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by a sigmoid (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """So et al. 2021."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
}


def capped(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap), in place (Gemma 2's soft cap)."""
    return x.div_(cap).tanh_().mul_(cap)


class Weights(nn.Module):
    """A matrix or vector and perhaps a bias, without gradients; the loader fills them."""

    bias: nn.Parameter | None

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        bias_shape = shape[:-1] if len(shape) > 1 else shape
        self.bias = nn.Parameter(torch.empty(bias_shape), requires_grad=False) if bias else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """`F.linear`; with `rows`, by products of exactly so many rows each, the last ones padded.

    A library chooses its kernel, and with it the order of sums, by the number of rows: with always the same
    number a row's bits don't depend on how many there are.
    """
    if not rows:
        return F.linear(x, weight, bias)
    count = x.shape[0]
    if count % rows:
        x = F.pad(x, (0, 0, 0, -count % rows))
    if len(x) == rows:
        return F.linear(x, weight, bias)[:count]
    return torch.cat([F.linear(part, weight, bias) for part in torch.split(x, rows)])[:count]


class Linear(Weights):
    """weight [out, in]. `reduce`: the sum over the ranks that hold a part of it each (see `parallel`)."""

    reduce: Callable[[Tensor], Tensor] | None = None
    rows = 0  # see `product`

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        out = product(x, self.weight, self.bias, self.rows)
        return out if self.reduce is None else self.reduce(out)


class Embedding(Weights):
    """A table [rows, width], read by row."""

    if TYPE_CHECKING:

        def __call__(self, ids: Tensor) -> Tensor: ...

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class TiedHead(nn.Module):
    """A product with the token embeddings' own matrix."""

    rows = 0  # see `product`

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, embed: Embedding) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.embed.weight, None, self.rows)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; `own` heads have weights of their own."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, spec: NormSpec, size: int, own: int = 0) -> None:
        super().__init__()
        if spec.kind not in ("rms", "layer"):
            raise ValueError(f"norm {spec.kind!r} is not implemented")
        shape = (own, size) if own else (size,)
        self.rms = spec.kind == "rms"
        self.eps = spec.eps
        self.offset = spec.offset
        self.shape = (size,)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False) if spec.weight else None
        self.bias = nn.Parameter(torch.empty(shape), requires_grad=False) if spec.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.weight, self.bias)

    def scaled(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x normalized, with this weight and bias."""
        if self.offset and weight is not None:  # in float32, as Gemma does: 1 + w has more digits than w
            return self._normed(x.float(), weight.float() + self.offset, None).to(x.dtype)
        if weight is not None and weight.dim() > 1:
            scaled = self._normed(x, None, None) * weight
            return scaled if bias is None else scaled + bias
        return self._normed(x, weight, bias)

    def _normed(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)
