"""Makes the Python stubs beside the .proto files, and the native kernel of a wheel.

Run as a script (``python protos/generate.py``) and by the build, as hatchling's
build hook, so that there is one way to make them. The protoc is pinned to an
old release in pyproject.toml: stubs of an old protoc run under newer runtimes,
never the reverse.

A wheel holds the kernel compiled, and is then for this platform, where a compiler is at hand;
otherwise it is for every platform. SALVER_BUILD_KERNELS=1 makes a missing compiler an error, =0
leaves the kernel out. An editable install compiles at its first start instead.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run as a script, outside a build
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT.parent / "model" / "salver" / "model" / "kernels"


def generate(root: Path = ROOT) -> None:
    """Writes ``*_pb2.py``, ``*_pb2.pyi`` and ``*_pb2_grpc.py`` for every .proto under root.

    Raises RuntimeError when protoc refuses a file (it has printed why).
    """
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    files = sorted(str(path.relative_to(root)) for path in root.glob("salver/**/*.proto"))
    arguments = ["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={root}", f"--pyi_out={root}"]
    if protoc.main([*arguments, f"--grpc_python_out={root}", *files]) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(files)}")


def load_kernel_build() -> ModuleType:
    """`salver.model.kernels.build`, which needs the standard library alone, without an installed Salver."""
    spec = importlib.util.spec_from_file_location("salver_kernel_build", KERNELS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wants_kernel(setting: str, *, compiler: str | None, machine: str) -> bool:
    """Whether a wheel made here holds the kernel; `setting` is SALVER_BUILD_KERNELS.

    Raises RuntimeError when it must and cannot, ValueError for another setting than "", "0" and "1".
    """
    if setting not in ("", "0", "1"):
        raise ValueError(f"SALVER_BUILD_KERNELS is 0 or 1, not {setting!r}")
    possible = compiler is not None and machine in ("x86_64", "AMD64") and sys.platform == "linux"
    if setting == "1" and not possible:
        raise RuntimeError("SALVER_BUILD_KERNELS=1 needs a C++ compiler on x86-64 Linux")
    return possible and setting != "0"


def wheel_tag() -> str:
    """For any Python 3 on this platform: the kernel is called by ctypes and links no Python."""
    return f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc,type-arg,unused-ignore]
    """hatchling's hook: the stubs exist before files are collected, also for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate()
        if self.target_name != "wheel" or version == "editable":
            return
        build = load_kernel_build()
        compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, build.COMPILERS)), None)
        setting = os.environ.get("SALVER_BUILD_KERNELS", "")
        if not wants_kernel(setting, compiler=compiler, machine=platform.machine()):
            return
        # Not at its place in the sources, where it would be found before what is compiled from them.
        library = Path(self.directory) / build.PREBUILT.name
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_to(library, compiler)
        except build.KernelUnavailable as error:
            if setting == "1":
                raise
            self.app.display_warning(f"the wheel is without the native kernel: {error}")
            return
        build_data["force_include"][str(library)] = f"salver/model/kernels/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        for path in build_data.get("force_include", {}):
            Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    generate()
