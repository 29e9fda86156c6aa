"""Finds the compiled kernel, or compiles it where a C++ compiler is at hand. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
MAIN = SOURCE / "step.cpp"
PREBUILT = Path(__file__).with_name("salver_kernels.so")
PROCESSOR_FEATURES = (
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
)
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden"),
    *("-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni"),
)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300.0  # seconds


class KernelUnavailable(Exception):
    """The kernel cannot be used here, and why."""


def source_digest() -> str:
    """Names the sources and the flags that they are compiled with."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor(fact: str) -> list[str]:
    """Words that /proc/cpuinfo says of the first processor, such as its flags. Raises KernelUnavailable."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise KernelUnavailable(f"/proc/cpuinfo does not tell the processor: {error}") from error
    return next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith(fact)), [])


def pairs_are_fast() -> bool:
    """Whether `vdpbf16ps` multiplies more than `vfmadd`: AMD runs one a cycle, Intel one every other."""
    return _processor("vendor_id") == ["AuthenticAMD"]


def numerics() -> str:
    """Names all that the bits of a result depend on: the sources, and what is multiplied how here."""
    return source_digest() + (" pairs" if pairs_are_fast() else "")


def check_processor() -> None:
    """Raises KernelUnavailable on a processor that lacks an instruction."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise KernelUnavailable(f"it is for x86-64 processors, and this is {platform.machine()}")
    flags = _processor("flags")
    if missing := [name for name in PROCESSOR_FEATURES if name not in flags]:
        raise KernelUnavailable(f"this processor has no {', '.join(missing)}")


def find_or_build(cache_dir: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The library's path: the one in the wheel, else the one in the cache, else compiled into it.

    Raises KernelUnavailable.
    """
    check_processor()
    if PREBUILT.exists():
        return PREBUILT
    path = cache_dir / "kernels" / f"salver_kernels-{source_digest()}.so"
    if path.exists():
        return path
    compiler = next(filter(None, (os.environ.get("CXX"), *map(shutil.which, COMPILERS))), None)
    if compiler is None:
        raise KernelUnavailable(f"no C++ compiler was found ({', '.join(COMPILERS)})")
    tell(f"compiling the native kernel with {compiler} (once)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as lock:  # several servers may start at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                compile_to(path, compiler)
    except OSError as error:
        raise KernelUnavailable(f"{path} could not be written: {error}") from error
    return path


def compile_to(path: Path, compiler: str) -> None:
    """Compiles the library, whole or not at all. Raises KernelUnavailable with the compiler's words."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(MAIN), "-o", str(part)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode != 0:
            words = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise KernelUnavailable(f"{compiler} failed: {words.strip()}")
        part.replace(path)
    except subprocess.TimeoutExpired:
        raise KernelUnavailable(f"{compiler} took more than {TIMEOUT:g} s") from None
    finally:
        part.unlink(missing_ok=True)
