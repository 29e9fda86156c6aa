"""--quantization through gRPC: told, exact in any company, refused without the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.test_exactness import alone, requests, together
from support.serving import Server

from salver.model.kernels import build
from salver.v1 import model_pb2


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_told_and_exact(quantization: str, tiny_llama: Path, start_server: Callable[..., Server]) -> None:
    try:
        build.check_processor()
    except build.KernelUnavailable as error:
        pytest.skip(f"no native kernel here: {error}")
    server = start_server(tiny_llama, "--quantization", quantization, "--kernels", "native")
    plain = start_server(tiny_llama, "--kernels", "native")
    assert server.models.GetModel(model_pb2.GetModelRequest()).model.quantization == quantization
    assert plain.models.GetModel(model_pb2.GetModelRequest()).model.quantization == "none"
    ours, theirs = server.server_info().numerics_id, plain.server_info().numerics_id
    assert ours.startswith("bits-") and theirs.startswith("bits-") and ours != theirs
    ways = requests(48)
    truth = alone(server, ways)
    assert together(server, ways, others=12) == truth
    server.wait_idle()


def test_refused_without_the_kernel(tiny_llama: Path, cache_dir: Path) -> None:
    flags = ("--quantization", "int8", "--kernels", "torch", "--cache-dir", str(cache_dir))
    server = Server(str(tiny_llama), *flags)
    try:
        assert server.process.wait(timeout=60) != 0
        assert "--quantization int8" in server.log and "--kernels" in server.log
    finally:
        server.kill()
