"""A start that cannot work ends at once and says what to do; one that can, shows how it goes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.serving import SALVER, Server, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def failed_start(model: object, *flags: str, cache_dir: Path, env: dict[str, str] | None = None) -> str:
    """What a start that must fail prints."""
    command = [SALVER, "serve", str(model), "--cache-dir", str(cache_dir), "--dtype", "float32", *flags]
    if "--kernels" not in flags:
        command += ["--kernels", "torch"]  # compiles nothing into a cache directory that is new
    if "--port" not in flags:
        command += ["--port", "0"]
    if "--metrics-port" not in flags:
        command += ["--metrics-port", "0"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -signal.SIGSEGV, -signal.SIGKILL), said
    assert "Traceback" not in said, said
    assert not re.search(r"^serving ", said, re.MULTILINE), said
    return said


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "checkpoint"))


def rewrite(checkpoint: Path, change: Callable[[dict[str, object]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda tensors: tensors.pop(name))
    assert name in failed_start(copy, cache_dir=tmp_path)


def test_an_extra_tensor(copy: Path, tmp_path: Path) -> None:
    import torch

    rewrite(copy, lambda tensors: tensors.update({"model.layers.1.mlp.surprise": torch.zeros(3)}))
    assert "model.layers.1.mlp.surprise" in failed_start(copy, cache_dir=tmp_path)


def test_a_misshaped_tensor(copy: Path, tmp_path: Path) -> None:
    import torch

    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    said = failed_start(copy, cache_dir=tmp_path)
    assert name in said and "64" in said and "32" in said


@pytest.mark.parametrize("keep", [0.5, 0.001, 0.0])
def test_a_truncated_file(copy: Path, tmp_path: Path, keep: float) -> None:
    weights = copy / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * keep))
    assert "model.safetensors" in failed_start(copy, cache_dir=tmp_path)


@pytest.mark.parametrize("keep", [0.7, 0.0001, 0.0])
def test_a_truncated_gguf(smollm2_gguf: Path, tmp_path: Path, keep: float) -> None:
    part = tmp_path / "part.gguf"
    with smollm2_gguf.open("rb") as whole:
        part.write_bytes(whole.read(int(smollm2_gguf.stat().st_size * keep)))
    assert "part.gguf" in failed_start(part, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_broken_json_file(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_text('{"architectures": [')
    assert name in failed_start(copy, cache_dir=tmp_path)
    (copy / name).unlink()
    assert name in failed_start(copy, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["GPT17ForCausalLM"]),
        ("hidden_act", "swish9"),
        ("num_key_value_heads", 3),
        ("rope_scaling", {"rope_type": "invented", "factor": 2.0}),
    ],
)
def test_a_config_that_is_not_implemented(copy: Path, tmp_path: Path, field: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    config[field] = value
    config.pop("rope_parameters", None) if field == "rope_scaling" else None
    (copy / "config.json").write_text(json.dumps(config))
    said = failed_start(copy, cache_dir=tmp_path)
    wanted = str(value[0]) if isinstance(value, list) else str(field)
    assert wanted in said or "invented" in said


def test_no_such_model(tmp_path: Path) -> None:
    said = failed_start("no-such-model", cache_dir=tmp_path)
    assert "no-such-model" in said and "smollm2" in said


def test_offline_without_the_model(tmp_path: Path) -> None:
    assert "--offline" in failed_start("smollm2", "--offline", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--port", "http"),
        ("--max-model-len", "0"),
        ("--max-num-seqs", "-1"),
        ("--kv-cache-memory", "lots"),
        ("--dtype", "float12"),
        ("--device", "tpu"),
        ("--no-such-flag", "1"),
    ],
)
def test_a_bad_flag_is_named(tiny_llama: Path, tmp_path: Path, flag: str, value: str) -> None:
    assert flag in failed_start(tiny_llama, flag, value, cache_dir=tmp_path)


def test_flags_that_the_checkpoint_cannot_keep(tiny_llama: Path, tmp_path: Path) -> None:
    said = failed_start(tiny_llama, "--max-model-len", "4096", cache_dir=tmp_path)
    assert "--max-model-len" in said and "512" in said
    assert "--kv-cache-memory" in failed_start(tiny_llama, "--kv-cache-memory", "10", cache_dir=tmp_path)


def test_a_bad_environment_variable_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    said = failed_start(tiny_llama, cache_dir=tmp_path, env={"SALVER_MAX_NUM_SEQS": "many"})
    assert "--max-num-seqs" in said or "SALVER_MAX_NUM_SEQS" in said


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use(tiny_llama: Path, tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = failed_start(tiny_llama, flag, port, cache_dir=tmp_path)
    assert port in said and flag in said


def test_a_port_that_another_salver_has(tiny: Server, tiny_llama: Path, tmp_path: Path) -> None:
    """gRPC would share it silently if it were let to."""
    port = tiny.address.rpartition(":")[2]
    assert port in failed_start(tiny_llama, "--port", port, cache_dir=tmp_path)


def test_the_phases_are_printed(server: Server) -> None:
    listening = next(i for i, line in enumerate(server.lines) if line.startswith("listening on "))
    serving = next(i for i, line in enumerate(server.lines) if line.startswith("serving smollm2 on "))
    assert listening < serving
    phases = {phase.name for phase in server.server_info().startup_phases}
    assert phases
    assert all(any(name in line for line in server.lines) for name in phases)
    for phase in phases:  # and Prometheus sees them
        assert server.metric("salver_startup_phase_seconds", phase=phase) >= 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_make_run(smollm2_gguf: Path, cache_dir: Path) -> None:
    """What `make run` runs once all is installed: serves, answers a question, ends cleanly on Ctrl-C."""
    port = free_port()
    shown: list[str] = []
    process = subprocess.Popen(
        [
            *(sys.executable, str(REPOSITORY / "deploy" / "run_local.py"), "--port", str(port)),
            *("--metrics-port", str(free_port()), "--", "--cache-dir", str(cache_dir)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def read() -> None:
        assert process.stdout is not None
        shown.extend(process.stdout)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_until(
            "the answer, and that it goes on",
            lambda: process.poll() is not None or any("Ctrl-C ends it" in line for line in shown),
            120,
        )
        text = "".join(shown)
        assert process.poll() is None, text
        assert "Paris" in text.partition("salver chat")[2], text
        # As a terminal does it: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 0, "".join(shown)
        reader.join(10)
        assert "Traceback" not in "".join(shown)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "something still listens"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def test_the_kernel_that_computes_is_told(tiny: Server, tiny_llama: Path, tmp_path: Path) -> None:
    """Native where it can be had; else plain torch, saying why; and no start where it was insisted on."""
    told = next(line for line in tiny.lines if "msg=ready" in line)
    assert "kernels=native" in told or 'kernels="torch (' in told
    without = {"PATH": "", "CXX": ""}
    said = failed_start(tiny_llama, "--kernels", "native", cache_dir=tmp_path, env=without)
    assert "--kernels native" in said and ("compiler" in said or "processor" in said)
