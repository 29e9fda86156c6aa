"""Makes the Python stubs beside the .proto files.

Run as a script (``python protos/generate.py``) and by the build, as hatchling's
build hook, so that there is one way to make them. The protoc is pinned to an
old release in pyproject.toml: stubs of an old protoc run under newer runtimes,
never the reverse.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run as a script, outside a build
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent


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


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc,type-arg,unused-ignore]
    """hatchling's hook: the stubs exist before files are collected, also for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate()


if __name__ == "__main__":
    generate()
