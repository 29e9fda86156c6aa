"""What kind of wheel the build hook makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HOOK = Path(__file__).resolve().parents[2] / "protos" / "generate.py"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", HOOK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is for Linux")
@pytest.mark.parametrize(
    ("setting", "compiler", "machine", "expected"),
    [
        ("", "/usr/bin/c++", "x86_64", True),
        ("1", "/usr/bin/c++", "x86_64", True),
        ("0", "/usr/bin/c++", "x86_64", False),
        ("", None, "x86_64", False),
        ("", "/usr/bin/c++", "aarch64", False),
    ],
)
def test_a_wheel_holds_the_kernel_where_it_can(
    hook: ModuleType, setting: str, compiler: str | None, machine: str, expected: bool
) -> None:
    assert hook.wants_kernel(setting, compiler=compiler, machine=machine) is expected


def test_a_kernel_that_must_be_there_and_cannot(hook: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="compiler"):
        hook.wants_kernel("1", compiler=None, machine="x86_64")
    with pytest.raises(ValueError, match="yes"):
        hook.wants_kernel("yes", compiler=None, machine="x86_64")


def test_the_tag_names_the_platform_and_no_python(hook: ModuleType) -> None:
    python, abi, platform = hook.wheel_tag().split("-")
    assert (python, abi) == ("py3", "none")
    assert platform.startswith(sys.platform) and "." not in platform


def test_the_library_is_where_the_engine_looks(hook: ModuleType) -> None:
    build = hook.load_kernel_build()
    assert build.PREBUILT.parent == hook.KERNELS and build.MAIN.exists()
