"""What a start finds and reads before it serves: the checkpoint, the kernel, and the front's part of both.

Nothing here needs torch or gRPC. What cannot be had is a StartError, for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from salver.model.chat_template import ChatTemplate, ChatTemplateError
from salver.model.checkpoint import resolve_checkpoint, weights_digest
from salver.model.config_reader import FieldsRead
from salver.model.embedding_spec import EmbeddingSpec, read_embedding_spec
from salver.model.encoder_config import read_any_spec
from salver.model.encoder_spec import EncoderSpec
from salver.model.errors import CheckpointError
from salver.model.generation_config import GenerationConfig
from salver.model.kernels.build import KernelUnavailable, find_or_build
from salver.model.precision import default_dtype_name, weights_dtype_name
from salver.model.spec import ModelSpec
from salver.model.tokenizer import Tokenizer
from salver.server.catalog import CATALOG, CatalogError, fetch
from salver.server.config import ServerConfig
from salver.server.hub import HubError, fetch_from_hub, is_hub_id
from salver.server.startup_phases import say


class StartError(Exception):
    """The server cannot start; the message is for a person and names what to change."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is read of the checkpoint by the front."""

    spec: ModelSpec | EncoderSpec
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    generation_config: GenerationConfig
    checkpoint: Path
    embedding: EmbeddingSpec
    fields: FieldsRead


def check_adapters(config: ServerConfig, name: str) -> None:
    """Raises StartError for an adapter that has the model's own name, and for a root that is not there."""
    if name in dict(config.adapter):
        raise StartError(f"--adapter {name}: that is the name of the model (--served-name)")
    for flag, root in (("--adapter-root", config.adapter_root), ("--weights-root", config.weights_root)):
        if root is not None and not root.is_dir():
            raise StartError(f"{flag} {root}: is no directory")


def served_name(config: ServerConfig) -> str:
    """--served-name, or the catalog name, or the last component of the path (without `.gguf`)."""
    if config.served_name is not None:
        return config.served_name
    if config.model in CATALOG:
        return config.model
    path = Path(config.model).absolute()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def find_checkpoint(config: ServerConfig) -> tuple[Path, str]:
    """The checkpoint's directory and the digest of its weights. Raises StartError."""
    checkpoint = _resolve(config, config.model, "MODEL")
    try:
        return checkpoint, weights_digest(checkpoint, config.resolved_cache_dir)
    except CheckpointError as error:
        raise StartError(str(error)) from error


def find_speculative_checkpoint(config: ServerConfig, checkpoint: Path) -> Path | None:
    """The draft model's directory, None where there is none. Raises StartError: also for other tokens."""
    if config.speculative_model is None:
        return None
    found = _resolve(config, config.speculative_model, "--speculative-model")
    try:
        ours, theirs = (Tokenizer.from_directory(path) for path in (checkpoint, found))
    except CheckpointError as error:
        raise StartError(f"--speculative-model: {error}") from error
    for index in range(max(ours.vocab_size, theirs.vocab_size)):
        if ours.token(index) != theirs.token(index):
            raise StartError(
                f"--speculative-model {config.speculative_model}: its tokens are not the model's: "
                f"token {index} is {theirs.token(index)!r}, not {ours.token(index)!r}"
            )
    return found


def _resolve(config: ServerConfig, source: str, flag: str) -> Path:
    """The directory of the checkpoint that `flag` names. Raises StartError."""
    cache = config.resolved_cache_dir
    try:
        if source in CATALOG and not Path(source).exists():
            source = str(fetch(source, cache, config.offline, say))
        elif not Path(source).exists() and is_hub_id(source):
            revision = config.revision if flag == "MODEL" else None
            source = str(fetch_from_hub(source, revision, cache, config.offline, say))
        elif not Path(source).exists():
            raise StartError(
                f"{flag} {source!r} is neither a catalog name ({', '.join(sorted(CATALOG))}) nor a "
                "checkpoint directory nor a .gguf file, nor a hub id (org/name)"
            )
        elif flag == "MODEL" and config.revision is not None:
            raise StartError(f"--revision {config.revision}: {source} is on the disk and has none")
        dtype = default_dtype_name(config.device) if config.dtype == "auto" else config.dtype
        return resolve_checkpoint(source, cache, weights_dtype_name(dtype, config.quantization), say)
    except (CatalogError, HubError, CheckpointError) as error:
        raise StartError(str(error)) from error


def find_kernel(config: ServerConfig) -> tuple[str, str]:
    """The native kernel's path, compiled if need be; or nothing, and why. Raises StartError."""
    if config.kernels == "torch" or config.device == "cuda":
        return "", ""
    if config.kernels == "auto" and config.device == "auto" and Path("/dev/nvidiactl").exists():
        return "", "this machine has a GPU"
    try:
        return str(find_or_build(config.resolved_cache_dir, say)), ""
    except KernelUnavailable as error:
        if config.kernels == "native":
            raise StartError(f"--kernels native: {error}") from error
        return "", str(error)


def load_front(checkpoint: Path) -> Loaded:
    """What the front needs of the checkpoint, torch-free. Raises StartError."""
    fields = FieldsRead()
    try:
        spec = read_any_spec(checkpoint, fields)
        output_start = 0
        if isinstance(spec, ModelSpec) and spec.encoder is not None:
            output_start = len(spec.output_start) or 1
        return Loaded(
            spec,
            Tokenizer.from_directory(checkpoint),
            ChatTemplate.from_directory(checkpoint),
            GenerationConfig.from_directory(checkpoint, output_start=output_start),
            checkpoint,
            read_embedding_spec(checkpoint),
            fields,
        )
    except (CheckpointError, ChatTemplateError) as error:
        raise StartError(str(error)) from error
