"""Which precision a device computes in when nobody says. No torch: the front asks too, to convert a
GGUF file to the precision that the worker will choose."""

from __future__ import annotations

from pathlib import Path

_NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def default_dtype_name(device_type: str) -> str:
    """bfloat16 for "cuda" and for processors that multiply it natively, else float32."""
    return "bfloat16" if device_type == "cuda" or _cpu_flags() & _NATIVE_BFLOAT16 else "float32"


def weights_dtype_name(dtype: str, quantization: str) -> str:
    """In which precision weights are read that are computed in `dtype`.

    The blocks of 4 bits of a file are found again from all bits of the numbers that they stand for.
    """
    return "float32" if quantization == "int4" else dtype


def _cpu_flags() -> set[str]:
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.partition(":")[2].split())
    except OSError:
        return set()
    return set()
