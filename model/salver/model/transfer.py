"""From the host's memory to the device's, without waiting for the device where it is a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 32 << 20  # of a weight, copied at a time


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. To a GPU through pinned memory: a copy from other memory waits for all
    the work that was given to the device before.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[object], dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values)` on the device, as `on_device`."""
    return on_device(torch.tensor(values, dtype=dtype), device)


class Staging:
    """Copies weights to a GPU piece by piece through two pinned buffers: while the device takes one, the
    next piece of the file is read into the other. To a CPU, and to targets elsewhere, it copies directly.
    """

    def __init__(
        self, device: torch.device, *, piece_bytes: int = PIECE_BYTES, direct: bool | None = None
    ) -> None:
        """`direct`: without the buffers; unless said, where the device is not a GPU."""
        self._direct = device.type != "cuda" if direct is None else direct
        self._device = device
        self._piece_bytes = piece_bytes
        self._buffers: list[Tensor | None] = [None, None]
        self._taken: list[torch.cuda.Event | None] = [None, None]  # when the device has read a buffer
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """`target.copy_(source)` of equal shapes, any strides and types; on a GPU in its stream's order."""
        if self._direct or target.device != self._device or not source.numel():
            target.copy_(source)
            return
        if source.dim() == 0:
            source, target = source[None], target[None]
        rows = max(1, self._piece_bytes * len(source) // source.nbytes)
        for begin in range(0, len(source), rows):
            piece = source[begin : begin + rows]
            staged = self._stage(piece)
            target[begin : begin + rows].copy_(staged.to(self._device, non_blocking=True))
            if self._device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                self._taken[self._next] = event
            self._next = 1 - self._next

    def _stage(self, piece: Tensor) -> Tensor:
        """The piece in the next buffer, once the device has read what was there before."""
        taken = self._taken[self._next]
        if taken is not None:
            taken.synchronize()
        buffer = self._buffers[self._next]
        if buffer is None or buffer.numel() < piece.nbytes:
            size = max(self._piece_bytes, piece.nbytes)
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._buffers[self._next] = buffer
        staged = buffer[: piece.nbytes].view(piece.dtype).view(piece.shape)
        return staged.copy_(piece)
