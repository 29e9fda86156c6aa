"""What this device does at best, measured in a few milliseconds at the start, and what the weights take.

On a CPU by plain threads that work each for itself: the barriers of OpenMP's threads, which spin, take longer
than the work where others use the processors too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from salver.model.arithmetic import Roofline

SECONDS = 0.003  # about what each of the two measurements takes
MOST_CALLS = 32
# Read at a time: far above what a call costs, and short enough that others rarely disturb one.
PIECE = {"cpu": 1 << 20, "cuda": 64 << 20}
SIZE = {"cpu": 256, "cuda": 4096}  # of the square matrices: large enough to reach the units' speed

Work = tuple[int, Callable[[], Tensor]]  # how much, and what does it


def held_bytes(tensors: Sequence[Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@torch.inference_mode()
def measure_roofline(
    tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> Roofline:
    """Reads weights where they lie, as a step does, and multiplies matrices as they are multiplied there."""
    threads = torch.get_num_threads()
    pieces = _pieces(tensors, PIECE[device.type], MOST_CALLS * threads)
    if len(pieces) < 4 * threads:  # a small model: its weights come from the processor's caches
        pieces = [torch.ones(PIECE[device.type] // 8, dtype=torch.int64, device=device)]
        pieces *= MOST_CALLS * threads
    size = SIZE[device.type]
    if quantization != "none":
        left = torch.ones((size, size), dtype=torch.int8, device=device)
        multiply = torch._int_mm
    else:
        left = torch.ones((size, size), dtype=dtype, device=device)
        multiply = torch.mm
    reads: list[Work] = [(piece.nbytes, piece.sum) for piece in pieces]
    products: list[Work] = [(2 * size**3, lambda: multiply(left, left))] * MOST_CALLS
    if device.type == "cuda":
        return Roofline(_best_rate(reads, device), _best_rate(products, device))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def together(of_each: Sequence[list[Work]]) -> float:
                return sum(pool.map(lambda work: _best_rate(work, device), of_each))

            # No piece by two threads: the second would find it in a cache.
            return Roofline(
                together([reads[i::threads] for i in range(threads)]), together([products] * threads)
            )
    finally:
        torch.set_num_threads(threads)


def _pieces(tensors: Sequence[Tensor], piece: int, most: int) -> list[Tensor]:
    """Weights as int64 vectors of `piece` bytes, each once: a second reading would come from a cache."""
    found: list[Tensor] = []
    for tensor in tensors:
        count = min(tensor.nbytes // piece, most - len(found))
        if count > 0:
            words = tensor.detach().reshape(-1).view(torch.uint8)[: count * piece].view(torch.int64)
            found += words.view(count, -1).unbind()
    return found


@torch.inference_mode()
def _best_rate(work: Sequence[Work], device: torch.device) -> float:
    """Work a second in the fastest of the calls, on which SECONDS are spent; the first warms up."""
    best = 0.0
    end = time.perf_counter() + SECONDS
    for number, (amount, call) in enumerate(work):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if number or len(work) == 1:
            best = max(best, amount / (now - begin))
        if now > end and best:
            break
    return best
