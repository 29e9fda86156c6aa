"""What `salver serve` can be told: one table of flags, environment variables, help and defaults.

Every field of `ServerConfig` is a flag (`max_model_len` is `--max-model-len`), an environment
variable (`SALVER_MAX_MODEL_LEN`) and a key of the file of `--config` (`max-model-len`); the flag
wins, then the variable. A bad value ends the
start with exit code 2 and a message that names the flag.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configargparse

from salver.server.admin_config import AdminConfig, check_admin
from salver.server.config_file import config_file_values
from salver.server.engine.changes import adapter_sources
from salver.server.engine.config import EngineConfig
from salver.server.flags import flag as _flag
from salver.server.flags import integer as _integer
from salver.server.flags import (
    message_size,
    named_directories,
    parse_duration,
    parse_share,
    parse_size,
    port_or_off,
    printable_name,
)
from salver.server.observability_config import ObservabilityConfig
from salver.server.security_config import check_security

DEFAULT_DRAFT_TOKENS = 8
_CONFIG_VARIABLE = "SALVER_CONFIG"
LOG_LEVELS = ("debug", "info", "warning", "error")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/salver`, or `~/.cache/salver`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "salver"


@dataclass(frozen=True, slots=True)
class ServerConfig(AdminConfig, ObservabilityConfig):
    """Everything the server was told. Sizes in bytes, times in seconds; None: the server chooses."""

    model: str = _flag(
        dataclasses.MISSING,
        "Model",
        "a catalog name (smollm2, minilm, rampart, antiberty), a checkpoint directory, a .gguf file, "
        "or a hub id (org/name)",
    )
    revision: str | None = _flag(
        None,
        "Model",
        "of a hub id: a branch, a tag, or a commit",
        parse=printable_name,
        metavar="REVISION",
        shown="main",
    )
    served_name: str | None = _flag(
        None, "Model", "the name that requests use", parse=printable_name, metavar="NAME",
        shown="the catalog name, or the last component of the path",
    )  # fmt: skip
    cache_dir: Path | None = _flag(  # noqa: RUF009 - it makes a field, which is immutable
        None, "Model", "where downloaded and converted checkpoints are kept", parse=Path, metavar="DIR",
        shown="$XDG_CACHE_HOME/salver or ~/.cache/salver",
    )  # fmt: skip
    adapter: tuple[tuple[str, str], ...] = _flag(
        (), "Model", "LoRA adapters (PEFT directories) beside the model, NAME=DIR with commas between them; "
        "requests ask one by its name", parse=named_directories, metavar="NAME=DIR", shown="none",
    )  # fmt: skip
    max_adapter_rank: int = _flag(
        256, "Model", "largest rank of an adapter; one of more is refused", parse=_integer(1, 65536)
    )
    offline: bool = _flag(False, "Model", "download nothing; fail when the model is not in the cache")

    host: str = _flag("127.0.0.1", "Network", "address to listen on; 0.0.0.0 or :: for all")
    port: int = _flag(50051, "Network", "gRPC port; 0 takes a free one", parse=_integer(0, 65535))
    metrics_host: str | None = _flag(
        None, "Network", "address of the metrics endpoint", metavar="HOST", shown="as --host"
    )
    metrics_port: int | None = _flag(
        9090, "Network", "HTTP port of /metrics; 0 takes a free one, 'off' serves none",
        parse=port_or_off, metavar="PORT",
    )  # fmt: skip
    max_message_size: int = _flag(
        16 * 1024**2, "Network", "largest gRPC message, in either direction",
        parse=message_size, metavar="SIZE", shown="16MiB",
    )  # fmt: skip
    max_connection_age: float = _flag(
        1800.0, "Network", "ask clients to reconnect after this long, so that load balancers can move them; "
        "running calls go on; 0 never asks", parse=parse_duration, metavar="TIME", shown="30m",
    )  # fmt: skip

    device: str = _flag("auto", "Compute", "where the model runs", choices=("auto", "cpu", "cuda"))
    dtype: str = _flag(
        "auto", "Compute", "type of weights and cache", choices=("auto", "float32", "bfloat16", "float16")
    )
    quantization: str = _flag(
        "none", "Compute", "int8: weights and what they multiply in 8 bits; int4: weights in 4 bits, by "
        "blocks of 32, those of a GGUF file as they are: smaller than bfloat16, some quality lost "
        "(docs/performance.md); on a CPU they want the native kernel. A GPU has int8, and fp8: 8-bit floats",
        choices=("none", "int8", "int4", "fp8"),
    )  # fmt: skip
    numerics: str = _flag(
        "exact", "Compute", "exact: an answer does not depend on what else is in the batch; fast: it may",
        choices=("exact", "fast"),
    )  # fmt: skip
    kernels: str = _flag(
        "auto", "Compute", "native: our kernel for CPUs with AVX-512, compiled at the first start where the "
        "package brings none; torch: plain torch; auto: native where it can be had",
        choices=("auto", "native", "torch"),
    )  # fmt: skip
    threads: int | None = _flag(
        None, "Compute", "CPU threads of the model", parse=_integer(1, 4096), metavar="N",
        shown="one per core",
    )  # fmt: skip

    tensor_parallel_size: int = _flag(
        1, "Compute", "GPUs that share the model, each a part of every matrix; on a CPU, processes",
        parse=_integer(1, 64), metavar="N",
    )  # fmt: skip
    cuda_graphs: bool = _flag(
        True, "Compute", "on a GPU, launch decode steps kernel by kernel", negated=True,
    )  # fmt: skip

    max_model_len: int | None = _flag(
        None, "Batching", "longest prompt and output together", parse=_integer(2), metavar="TOKENS",
        shown="the checkpoint's context",
    )  # fmt: skip
    max_num_seqs: int | None = _flag(
        None, "Batching", "sequences computed at once", parse=_integer(1), metavar="N",
        shown="chosen for the device",
    )  # fmt: skip
    max_num_batched_tokens: int | None = _flag(
        None, "Batching", "tokens computed in one step", parse=_integer(1), metavar="TOKENS",
        shown="chosen for the device",
    )  # fmt: skip
    kv_cache_memory: int | None = _flag(
        None, "Batching", "memory of the key-value cache", parse=parse_size, metavar="SIZE",
        shown="chosen for the device",
    )  # fmt: skip
    gpu_memory_utilization: float = _flag(
        0.9, "Batching", "share of a GPU's memory for weights, steps and, with what is left of it, the cache",
        parse=parse_share, metavar="SHARE",
    )  # fmt: skip
    prefix_caching: bool = _flag(True, "Batching", "do not reuse the computed prefixes of earlier requests",
                                 negated=True)  # fmt: skip

    speculation: str = _flag(
        "auto", "Speculation", "check guesses at the next tokens, several in a step; answers stay the same. "
        "ngram: what followed the last tokens when they came before; draft: what --speculative-model says; "
        "auto: draft where that is given, else ngram", choices=("auto", "off", "ngram", "draft"),
    )  # fmt: skip
    speculative_model: str | None = _flag(
        None, "Speculation", "a smaller model with the same tokens, named as MODEL is", metavar="MODEL",
        shown="none",
    )  # fmt: skip
    num_draft_tokens: int | None = _flag(
        None, "Speculation", "most guesses checked in a step for each sequence; fewer where they do not pay",
        parse=_integer(1, 64), metavar="N", shown=str(DEFAULT_DRAFT_TOKENS),
    )  # fmt: skip

    max_samples: int = _flag(
        16,
        "Limits",
        "largest n of a request (never more than --max-num-seqs)",
        parse=_integer(1),
        metavar="N",
    )
    max_queued_requests: int = _flag(
        1024, "Limits", "requests that may wait; beyond: RESOURCE_EXHAUSTED", parse=_integer(1), metavar="N"
    )
    max_queued_tokens: int = _flag(
        262144, "Limits", "prompt tokens that may wait; beyond: RESOURCE_EXHAUSTED", parse=_integer(1),
        metavar="TOKENS",
    )  # fmt: skip
    deadline_admission: bool = _flag(
        True, "Limits", "take also requests that, with what is ahead of them, would end after their deadline",
        negated=True,
    )  # fmt: skip
    drain_period: float = _flag(
        30.0, "Limits", "how long running calls may go on after SIGTERM", parse=parse_duration,
        metavar="TIME", shown="30s",
    )  # fmt: skip

    check_integrity: bool = _flag(
        False, "Diagnosis", "check the cache's books after every step (slow; for tests and bug hunts)"
    )
    log_level: str = _flag("info", "Diagnosis", "least serious message that is logged", choices=LOG_LEVELS)

    @property
    def resolved_cache_dir(self) -> Path:
        return default_cache_dir() if self.cache_dir is None else self.cache_dir.expanduser()

    @property
    def resolved_metrics_host(self) -> str:
        return self.host if self.metrics_host is None else self.metrics_host

    @property
    def resolved_speculation(self) -> str:
        """off, ngram or draft."""
        if self.speculation != "auto":
            return self.speculation
        return "draft" if self.speculative_model is not None else "ngram"

    def engine_config(
        self,
        checkpoint: Path,
        weights_digest: str,
        *,
        kernel_library: str = "",
        no_kernel: str = "",
        speculative_checkpoint: Path | None = None,
    ) -> EngineConfig:
        """What of it the worker needs; the native kernel's path, or why there is none."""
        return EngineConfig(
            checkpoint=str(checkpoint),
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            numerics=self.numerics,
            kernels=self.kernels,
            kernel_library=kernel_library,
            no_kernel=no_kernel,
            threads=self.threads,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_memory=self.kv_cache_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            cuda_graphs=self.cuda_graphs,
            tensor_parallel_size=self.tensor_parallel_size,
            cache_dir=str(self.resolved_cache_dir),
            enable_prefix_caching=self.prefix_caching,
            weights_digest=weights_digest,
            check_integrity=self.check_integrity,
            speculation=self.resolved_speculation,
            speculation_chosen=self.speculation == "auto" and self.speculative_model is None,
            num_draft_tokens=self.num_draft_tokens or DEFAULT_DRAFT_TOKENS,
            speculative_model=str(speculative_checkpoint or ""),
            adapters=adapter_sources(self.adapter),
            more_adapters=self.adapter_root is not None,
            max_adapter_rank=self.max_adapter_rank,
        )


def flag_of(name: str) -> str:
    """The flag of a field of ServerConfig: `max_model_len` is `--max-model-len`."""
    row = next(f.metadata for f in dataclasses.fields(ServerConfig) if f.name == name)
    if name == "model":
        return "MODEL"
    return ("--no-" if row["negated"] else "--") + name.replace("_", "-")


def environment_variable_of(name: str) -> str:
    """The environment variable of a field: `max_model_len` is `SALVER_MAX_MODEL_LEN`."""
    return "SALVER_" + (name if name == "model" else flag_of(name)[2:].replace("-", "_")).upper()


_INHERITED = frozenset(
    row.name for part in (AdminConfig, ObservabilityConfig) for row in dataclasses.fields(part)
)


def _parser(prog: str) -> configargparse.ArgumentParser:
    parser = configargparse.ArgumentParser(
        prog=prog,
        description="Serve a model over gRPC." if prog.endswith("serve") else "Fetch what would be served.",
        epilog="Every flag can be set by the environment variable in brackets, and in the file of --config; "
        "the flag wins, then the variable.",
        add_env_var_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE",
        help=f"TOML file with flags, as `max-num-seqs = 64` or `offline = true` [{_CONFIG_VARIABLE}]",
    )  # fmt: skip
    groups: dict[str, Any] = {}
    # Inherited fields come first there, and last in the help.
    for row in sorted(dataclasses.fields(ServerConfig), key=lambda row: row.name in _INHERITED):
        spec = row.metadata
        group = groups.get(spec["group"]) or groups.setdefault(
            spec["group"], parser.add_argument_group(spec["group"])
        )
        variable = environment_variable_of(row.name)
        if row.name == "model":
            # Not required of argparse: the environment may name it (see parse_config).
            group.add_argument("model", metavar="MODEL", nargs="?", help=f"{spec['help']} [{variable}]")
            continue
        options: dict[str, Any] = {"dest": row.name, "env_var": variable, "default": row.default}
        if isinstance(row.default, bool):
            options["action"] = "store_false" if spec["negated"] else "store_true"
            text = f"{spec['help']} [{variable}]"
        else:
            default = spec["shown"] if spec["shown"] is not None else row.default
            text = f"{spec['help']} (default: {default}) [{variable}]"
            options["type"] = spec["parse"]
            options["choices"] = spec["choices"]
            options["metavar"] = spec["metavar"] or (None if spec["choices"] else row.name.upper())
        group.add_argument(flag_of(row.name), help=text.replace("%", "%%"), **options)
    return parser


def parse_config(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, prog: str = "salver serve"
) -> ServerConfig:
    """The configuration of a command line. Raises SystemExit (2, or 0 after --help)."""
    environ = os.environ if environ is None else environ
    parser = _parser(prog)
    # An empty variable is an unset one: manifests and compose files often pass them so. Kubernetes
    # sets SALVER_PORT=tcp://... in every pod beside a Service called salver (SALVER_ADMIN_PORT beside
    # salver-admin): not ours either.
    present = {
        name: value
        for name, value in environ.items()
        if name.startswith("SALVER_") and value and not (name.endswith("_PORT") and "://" in value)
    }
    file = present.pop(_CONFIG_VARIABLE, None)
    known = {environment_variable_of(row.name): row.name for row in dataclasses.fields(ServerConfig)}
    # Below the environment, which is below the command line.
    present = config_file_values(argv, file, known, parser) | present
    values = vars(parser.parse_args(list(argv), env_vars=present))
    values.pop("config")
    values["model"] = values["model"] or present.get("SALVER_MODEL")
    if not values["model"]:
        parser.error(
            "MODEL is missing: name a catalog model (smollm2), a checkpoint directory, a .gguf file or a hub "
            "id (org/name)"
        )
    config = ServerConfig(**values)
    _check_speculation(config, parser)
    check_security(config, parser)
    check_admin(config, parser)
    _check_adapters(config, parser)
    _check_ranks(config, parser)
    _check_ports(config, parser)
    return config


def _check_ports(config: ServerConfig, parser: configargparse.ArgumentParser) -> None:
    """Each port is one flag's; that of metrics may have an address of its own."""
    ports = {"--port": config.port, "--health-port": config.health_port, "--admin-port": config.admin_port}
    if config.resolved_metrics_host == config.host:
        ports["--metrics-port"] = config.metrics_port
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if port and (other := taken.setdefault(port, name)) != name:
            parser.error(f"argument {name}: {port} is taken by {other} already")


def _check_adapters(config: ServerConfig, parser: configargparse.ArgumentParser) -> None:
    """No more of them than may be."""
    if config.adapter_root is not None and len(config.adapter) > config.resolved_max_adapters:
        parser.error(f"argument --adapter: {len(config.adapter)} are more than --max-adapters")


def _check_ranks(config: ServerConfig, parser: configargparse.ArgumentParser) -> None:
    """What is not divided among several ranks."""
    if config.tensor_parallel_size == 1:
        return
    for flag, given in (
        ("--adapter", bool(config.adapter)),
        ("--adapter-root", config.adapter_root is not None),
        ("--weights-root", config.weights_root is not None),
        ("--quantization", config.quantization != "none"),
        ("--speculative-model", config.speculative_model is not None),
        ("--kernels native", config.kernels == "native"),
    ):
        if given:
            parser.error(f"argument --tensor-parallel-size: cannot be had with {flag}")


def _check_speculation(config: ServerConfig, parser: configargparse.ArgumentParser) -> None:
    """No flag that would do nothing."""
    kind = config.resolved_speculation
    if kind == "draft" and config.speculative_model is None:
        parser.error("argument --speculation: draft needs a --speculative-model")
    if kind != "draft" and config.speculative_model is not None:
        parser.error(f"argument --speculative-model: does nothing with --speculation {kind}")
    if kind == "off" and config.num_draft_tokens is not None:
        parser.error("argument --num-draft-tokens: does nothing with --speculation off")
