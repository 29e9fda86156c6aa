"""Flags, environment variables, help: one table, and bad values that name their flag."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from salver.server.config import (
    ServerConfig,
    environment_variable_of,
    flag_of,
    parse_config,
    parse_duration,
    parse_size,
)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_config(argv, environ)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    config = parse_config(["smollm2"], {})
    assert config == ServerConfig(model="smollm2")
    assert (config.host, config.port, config.metrics_port) == ("127.0.0.1", 50051, 9090)


def test_every_flag_is_in_the_help_with_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"], {})
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(ServerConfig):
        assert flag_of(field.name) in text
        assert f"[{environment_variable_of(field.name)}]" in text


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_config(["m", "--adapter", "a=/x, b=y=z"], {}).adapter == (("a", "/x"), ("b", "y=z"))
    for text in ("a", "=x", "a=", "a=x,a=y", ""):
        assert "--adapter" in refused(capsys, "m", "--adapter", text)


def test_what_several_ranks_do_not_share(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--adapter", "a=/x"], ["--quantization", "int8"], ["--kernels", "native"]):
        assert "--tensor-parallel-size" in refused(capsys, "m", "--tensor-parallel-size", "2", *flags)


def test_every_flag_changes_its_field(tmp_path: Path) -> None:
    """A flag that does nothing would be a lie in the help."""
    words = {
        "revision": "v1",
        "served_name": "n", "cache_dir": "/c", "host": "::1", "port": "1", "metrics_host": "::",
        "metrics_port": "2", "max_message_size": "1MiB", "max_connection_age": "1m", "device": "cpu",
        "dtype": "float32", "quantization": "int8",
        "numerics": "fast", "kernels": "torch", "threads": "3", "max_model_len": "7", "max_num_seqs": "4",
        "max_num_batched_tokens": "5", "kv_cache_memory": "6",
        "gpu_memory_utilization": "0.5", "max_samples": "2", "max_queued_requests": "8",
        "max_queued_tokens": "9", "drain_period": "500ms", "log_level": "debug",
        "tls_cert": "/cert", "tls_key": "/key", "tls_client_ca": "/ca", "tokens": "/tokens",
        "health_port": "6", "log_format": "json", "metrics_compat": "vllm", "otlp_endpoint": "http://c:4317",
        "speculation": "ngram", "speculative_model": "/d", "num_draft_tokens": "3",
        "adapter": "a=/x,b=/y", "tensor_parallel_size": "2",
        "admin_port": "7", "admin_host": "::1", "admin_token_file": "/tokens", "admin_tls_cert": "/cert",
        "admin_tls_key": "/key", "admin_tls_client_ca": "/ca", "adapter_root": "/adapters",
        "max_adapters": "3", "max_adapter_rank": "9", "weights_root": "/weights",
    }  # fmt: skip
    # Refused without the others.
    needed = {
        **dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), ("tls_cert", "tls_key")),
        **dict.fromkeys(("admin_token_file", "adapter_root", "weights_root"), ("admin_port",)),
        **dict.fromkeys(
            ("admin_tls_cert", "admin_tls_key", "admin_tls_client_ca"),
            ("admin_port", "admin_tls_cert", "admin_tls_key"),
        ),
        "max_adapters": ("admin_port", "adapter_root"),
    }
    default = parse_config(["m"], {})
    for field in dataclasses.fields(ServerConfig):
        if field.name == "model":
            continue
        value = [words[field.name]] if field.name in words else []
        beside = {name: words[name] for name in needed.get(field.name, ()) if name != field.name}
        flags = [word for name, text in beside.items() for word in (flag_of(name), text)]
        variables = {environment_variable_of(name): text for name, text in beside.items()}
        by_flag = parse_config(["m", flag_of(field.name), *value, *flags], {})
        variables[environment_variable_of(field.name)] = (value or ["true"])[0]
        assert by_flag == parse_config(["m"], variables)
        written = "".join(f"{flag_of(name)[2:]} = {json.dumps(text)}\n" for name, text in beside.items())
        written += f"{flag_of(field.name)[2:]} = {json.dumps(value[0]) if value else 'true'}\n"
        (tmp_path / "salver.toml").write_text(written)
        assert by_flag == parse_config(["m", "--config", str(tmp_path / "salver.toml")], {})
        changed = [
            f.name
            for f in dataclasses.fields(ServerConfig)
            if getattr(by_flag, f.name) != getattr(default, f.name)
        ]
        assert sorted(changed) == sorted([field.name, *beside])


def test_a_flag_wins_over_the_environment() -> None:
    config = parse_config(["m", "--port", "7"], {"SALVER_PORT": "8", "SALVER_MODEL": "other"})
    assert (config.model, config.port) == ("m", 7)
    assert parse_config([], {"SALVER_MODEL": "other"}).model == "other"


def test_what_kubernetes_and_compose_put_into_the_environment() -> None:
    environ = {"SALVER_PORT": "tcp://10.0.0.1:50051", "SALVER_THREADS": "", "SALVER_SERVICE_HOST": "10.0.0.1"}
    assert parse_config(["m"], environ) == ServerConfig(model="m")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--port", "http"),
        ("--metrics-port", "x"),
        ("--max-model-len", "0"),
        ("--max-num-seqs", "-1"),
        ("--threads", "0"),
        ("--kv-cache-memory", "lots"),
        ("--kv-cache-memory", "0"),
        ("--gpu-memory-utilization", "1.5"),
        ("--gpu-memory-utilization", "all"),
        ("--max-message-size", "3GiB"),
        ("--dtype", "float12"),
        ("--device", "tpu"),
        ("--drain-period", "-1s"),
        ("--log-level", "loud"),
        ("--served-name", " "),
        ("--por", "1"),
    ],
)
def test_a_bad_value_names_its_flag(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert flag in refused(capsys, "m", flag, value)


def test_a_bad_variable_names_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-num-seqs" in refused(capsys, "m", SALVER_MAX_NUM_SEQS="many")
    assert "SALVER_OFFLINE" in refused(capsys, "m", SALVER_OFFLINE="perhaps")


def test_no_model_and_one_port_for_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL" in refused(capsys)
    assert "--metrics-port" in refused(capsys, "m", "--port", "9000", "--metrics-port", "9000")
    for one, other in (
        ("--port", "--health-port"),
        ("--admin-port", "--port"),
        ("--health-port", "--admin-port"),
        ("--metrics-port", "--admin-port"),
    ):
        said = refused(capsys, "m", one, "9000", other, "9000")
        assert one in said and other in said and "9000 is taken" in said
    assert parse_config(["m", "--port", "0", "--metrics-port", "0", "--health-port", "0"], {}).port == 0
    elsewhere = ["--port", "9000", "--metrics-port", "9000", "--metrics-host", "127.0.0.2"]
    assert parse_config(["m", *elsewhere], {}).metrics_port == 9000


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--speculation", "draft"], "--speculation"),
        (["--speculation", "off", "--speculative-model", "/d"], "--speculative-model"),
        (["--speculation", "ngram", "--speculative-model", "/d"], "--speculative-model"),
        (["--speculation", "off", "--num-draft-tokens", "3"], "--num-draft-tokens"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens"),
    ],
)
def test_speculation_that_would_do_nothing(
    capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    assert f"argument {named}" in refused(capsys, "m", *flags)


def test_a_speculative_model_is_used_unless_told_otherwise() -> None:
    assert parse_config(["m"], {}).engine_config(Path("/c"), "").speculation in ("off", "ngram")
    config = parse_config(["m", "--speculative-model", "/d"], {})
    engine = config.engine_config(Path("/c"), "", speculative_checkpoint=Path("/d"))
    assert (engine.speculation, engine.speculative_model) == ("draft", "/d")


@pytest.mark.parametrize(("text", "port"), [("off", None), ("-1", None), ("0", 0), ("9091", 9091)])
def test_the_metrics_port_can_be_off(text: str, port: int | None) -> None:
    assert parse_config(["m", "--metrics-port", text], {}).metrics_port == port


def test_sizes_and_durations() -> None:
    assert parse_size("512MiB") == 512 << 20
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("2g") == 2 * 10**9
    assert parse_size("100") == 100
    assert [parse_duration(text) for text in ("30", "30s", "500ms", "2m", "1h")] == [30, 30, 0.5, 120, 3600]


def test_what_the_worker_is_told() -> None:
    flags = ["--dtype", "float32", "--threads", "2", "--no-prefix-caching", "--kv-cache-memory", "1MiB"]
    engine = parse_config(["m", *flags], {}).engine_config(Path("/c"), "digest")
    assert (engine.checkpoint, engine.dtype, engine.threads, engine.weights_digest) == (
        "/c", "float32", 2, "digest",
    )  # fmt: skip
    assert (engine.enable_prefix_caching, engine.kv_cache_memory) == (False, 1 << 20)


def test_a_file_of_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag wins, then the variable, then the file; what the file cannot say is refused by name."""
    file = tmp_path / "salver.toml"
    file.write_text('model = "m"\nport = 1\nthreads = 2\nmax-num-seqs = 3\noffline = true\n')
    environ = {"SALVER_CONFIG": str(file), "SALVER_THREADS": "7", "SALVER_MAX_NUM_SEQS": "8"}
    config = parse_config(["--max-num-seqs", "9"], environ)
    assert (config.model, config.port, config.threads, config.max_num_seqs) == ("m", 1, 7, 9)
    assert config.offline
    file.write_text("offline = false\n")
    assert not parse_config(["m", f"--config={file}"], {}).offline
    for text, complaint in (
        ("max-num-seq = 3", "no flag --max-num-seq; is it max-num-seqs?"),
        ("stop = [1]", "no flag --stop"),
        ("threads = [1]", "threads must be a text, a number"),
        ("threads = ", "cannot be read"),
        ("threads = 0", "--threads"),
    ):
        file.write_text(text + "\n")
        assert complaint in refused(capsys, "m", "--config", str(file))
    assert "--config" in refused(capsys, "m", "--config", str(tmp_path / "none"))
    assert "--config" in refused(capsys, "m", "--config")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tls-cert", "/c"], "--tls-cert: needs --tls-key"),
        (["--tls-key", "/k"], "--tls-key: needs --tls-cert"),
        (["--tls-client-ca", "/a"], "--tls-client-ca: needs --tls-cert"),
    ],
)
def test_half_of_tls(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, "m", *flags)
