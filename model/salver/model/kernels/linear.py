"""Single products by the native kernel, in the place of torch's: a row has the same bits in any batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encoder import Encoder
from ..layers import Linear
from .build import KernelUnavailable
from .library import MAX_WIDTH, PANEL, CBuffer, CWeight, Library, Precision, num_panels


class NativeLinear(nn.Module):
    """y = x weight^T + bias of float32 rows, with weights as they came: float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library, threads: int) -> None:
        """Packs a weight [out, in]. Raises KernelUnavailable for a width that the kernel does not know."""
        super().__init__()
        rows, depth = weight.shape
        check_width(depth)
        self._library = library
        self._threads = threads
        self._rows = rows
        precision = Precision.FLOAT32 if weight.dtype == torch.float32 else Precision.BFLOAT16
        panels, _ = library.pack(weight.detach(), precision, False, threads)
        self._weight = CWeight(
            data=panels.data_ptr(),
            precision=precision,
            rows=rows,
            depth=depth,
            panels=num_panels(rows, False),
        )
        # As buffers, so that they are found among what the model holds.
        self.register_buffer("panels", panels, persistent=False)
        if bias is not None:
            padded = torch.zeros(num_panels(rows, False) * PANEL)
            padded[:rows] = bias.detach().float()
            self.register_buffer("bias", padded, persistent=False)
            self._weight.bias = padded.data_ptr()

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


def check_head(model: Encoder) -> None:
    """Raises KernelUnavailable where the head has a product that the kernel does not know."""
    head = model.head
    if head is None:
        return
    check_width(model.spec.hidden_size)
    check_width(model.embed.weight.shape[1] if head.out is None else head.out.weight.shape[1])


def use_native_head(model: Encoder, library: Library, threads: int) -> None:
    """Gives the products of an encoder's head to the kernel, after `check_head`; it reads float32 then."""
    head = model.head
    if head is None:
        return
    for name, module in [*head.named_children()]:
        if isinstance(module, Linear):
            setattr(head, name, NativeLinear(module.weight, module.bias, library, threads))
    if head.norm is not None:
        head.norm.float()
    if head.out is None:
        bias = None if head.bias is None else head.bias.weight
        head.tied_product = NativeLinear(model.embed.weight, bias, library, threads)
        head.bias = None  # it is in the product


def replace_products(model: nn.Module, library: Library, threads: int) -> None:
    """Gives every linear map below `model` to the kernel, in float32. Raises KernelUnavailable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            parent, _, attribute = name.rpartition(".")
            native = NativeLinear(module.weight, module.bias, library, threads)
            setattr(model.get_submodule(parent), attribute, native)


def use_native_products(model: Encoder, library: Library, threads: int) -> None:
    """Gives every linear map of a float32 encoder to the kernel, which packs and so takes over its weights.

    For models that `encoder_program` does not know. Raises KernelUnavailable before anything is changed.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise KernelUnavailable(f"for encoders it computes float32 on the CPU, not {model.dtype}")
    check_head(model)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    for _, module in linear:
        check_width(module.weight.shape[1])
    use_native_head(model, library, threads)
    for name, module in linear:
        if not name.startswith("head."):
            parent, _, attribute = name.rpartition(".")
            native = NativeLinear(module.weight, module.bias, library, threads)
            setattr(model.get_submodule(parent), attribute, native)
