"""Single products by the native kernel, in the place of torch's: a row has the same bits in any batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encoder import Encoder
from ..layers import Linear
from .build import KernelUnavailable
from .library import MAX_WIDTH, PANEL, CBuffer, CWeight, Library, Precision, num_panels


class NativeLinear(nn.Module):
    """y = x weight^T + bias in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library, threads: int) -> None:
        """Packs a weight [out, in]. Raises KernelUnavailable for a width that the kernel does not know."""
        super().__init__()
        rows, depth = weight.shape
        check_width(depth)
        self._library = library
        self._threads = threads
        self._rows = rows
        panels, _ = library.pack(weight.detach().float(), Precision.FLOAT32, False, threads)
        padded = torch.zeros(num_panels(rows, False) * PANEL)
        if bias is not None:
            padded[:rows] = bias.detach().float()
        # As buffers, so that they are found among what the model holds.
        self.register_buffer("panels", panels, persistent=False)
        self.register_buffer("bias", padded, persistent=False)
        self._weight = CWeight(
            data=panels.data_ptr(), bias=padded.data_ptr(), precision=Precision.FLOAT32,
            rows=rows, depth=depth, panels=num_panels(rows, False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, out] of x [N, in]."""
        x = x.contiguous()
        rows = CBuffer(data=x.data_ptr(), stride=x.stride(0), precision=Precision.FLOAT32, width=x.shape[1])
        out = torch.empty((x.shape[0], self._rows))
        self._library.multiply(rows, self._weight, out, self._threads)
        return out


def check_width(width: int) -> None:
    """Raises KernelUnavailable."""
    if width % 4 or width > MAX_WIDTH:
        raise KernelUnavailable(f"a width of {width} is not a multiple of 4 up to {MAX_WIDTH}")


def use_native_products(model: Encoder, library: Library, threads: int) -> None:
    """Gives every linear map of a float32 encoder to the kernel, which packs and so takes over its weights.

    Raises KernelUnavailable before anything is changed.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise KernelUnavailable(f"for encoders it computes float32 on the CPU, not {model.dtype}")
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    for _, module in linear:
        check_width(module.weight.shape[1])
    tied = model.head is not None and model.head.out is None
    if tied:
        check_width(model.embed.weight.shape[1])
    for name, module in linear:
        parent, _, attribute = name.rpartition(".")
        native = NativeLinear(module.weight, module.bias, library, threads)
        setattr(model.get_submodule(parent), attribute, native)
    if tied and model.head is not None:
        bias = None if model.head.bias is None else model.head.bias.weight
        model.head.tied_product = NativeLinear(model.embed.weight, bias, library, threads)
