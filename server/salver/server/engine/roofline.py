"""What this device does at best, measured in a few milliseconds at the start, and what the weights take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from salver.model.arithmetic import Roofline

SECONDS = 0.004  # about what each of the two measurements takes
READ_BYTES = 24 << 20  # of the weights, in one pass
SMALL_BYTES = 4 << 20  # weights below that are read from the processor's caches, like this much memory
SIZE = {"cpu": 384, "cuda": 4096}  # of the square matrices: large enough to reach the units' speed


def held_bytes(tensors: Sequence[Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@torch.inference_mode()
def measure_roofline(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Roofline:
    """Reads weights where they lie (a step does the same), and multiplies matrices of `dtype`."""
    pieces = _pieces(tensors)
    if len(pieces) < 2:
        pieces = [torch.ones(SMALL_BYTES // 8, dtype=torch.int64, device=device)] * 3
    size = SIZE[device.type]
    left = torch.ones((size, size), dtype=dtype, device=device)
    return Roofline(
        bytes_per_second=_best_rate(((piece.nbytes, piece.sum) for piece in pieces), device),
        operations_per_second=_best_rate(
            ((2 * size**3, lambda: torch.mm(left, left)) for _ in range(8)), device
        ),
    )


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Weights as int64 vectors of at least SMALL_BYTES, READ_BYTES in all; each is read once, as
    the next reading would come from a cache."""
    found: list[Tensor] = []
    total = 0
    for tensor in tensors:
        if tensor.nbytes < SMALL_BYTES or total >= READ_BYTES:
            continue
        words = tensor.detach().reshape(-1).view(torch.uint8)
        step = SMALL_BYTES
        for begin in range(0, words.numel() - step + 1, step):
            found.append(words[begin : begin + step].view(torch.int64))
            total += step
            if total >= READ_BYTES:
                break
    return found


def _best_rate(calls: Iterable[tuple[int, Callable[[], Tensor]]], device: torch.device) -> float:
    """Work a second in the fastest of the calls, of which SECONDS are spent; the first warms up."""
    best = 0.0
    end = None
    for work, call in calls:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if end is None:
            end = now + SECONDS
            best = work / (now - begin)
            continue
        best = max(best, work / (now - begin))
        if now > end:
            break
    return best
