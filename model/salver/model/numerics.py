"""Which bits depend on what: the row probe, the default precision, the numerics id."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from salver.model.transformer import Transformer

REVISION = 1  # raised by any change of ours that may change an answer
MULTIPLES = (1, 2, 4, 8, 16)
_PROBE_ROWS = 80


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return torch.float32
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(flags) else torch.float32


@torch.inference_mode()
def row_multiple(model: Transformer) -> int:
    """The smallest multiple of rows at which every product gives a row the same bits as in a larger batch.

    Libraries choose another kernel, and another order of sums, for some numbers of rows. Every
    weight shape of the model is tried. Returns the last of MULTIPLES when none holds.
    """
    weights = {p.shape: p for p in model.parameters() if p.dim() == 2}
    generator = torch.Generator().manual_seed(0)
    for multiple in MULTIPLES:
        if all(_holds(weight, multiple, generator) for weight in weights.values()):
            return multiple
    return MULTIPLES[-1]


def _holds(weight: torch.Tensor, multiple: int, generator: torch.Generator) -> bool:
    x = torch.randn(_PROBE_ROWS, weight.shape[1], generator=generator).to(weight)
    whole = F.linear(x, weight)
    for rows in {multiple, 2 * multiple, 3 * multiple, 5 * multiple}:
        for start in (0, _PROBE_ROWS - rows):
            if not torch.equal(F.linear(x[start : start + rows], weight), whole[start : start + rows]):
                return False
    return True


def numerics_id(
    model: Transformer, *, weights_digest: str, numerics: str, threads: int, row_multiple: int
) -> str:
    """Names everything beside the request that an answer depends on.

    The prefix is the promise that holds: "tokens" (the same request gives the same tokens, alone or in
    any batch, cached, chunked, preempted or resumed) or "none" (it nearly always does).
    """
    device = model.device
    parts = {
        "revision": REVISION,
        "weights": weights_digest,
        "dtype": str(model.dtype),
        "numerics": numerics,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "row_multiple": row_multiple,
    }
    promise = "tokens" if numerics == "exact" and model.dtype == torch.float32 else "none"
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{promise}-{digest[:24]}"
