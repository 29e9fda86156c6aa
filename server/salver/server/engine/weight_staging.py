"""New weights for a model that computes: read and built beside it, then put in its place at once.

On a CPU the new ones stand in memory beside the old until then, packed as steps want them. A GPU has
no room for twice the weights, so there they wait in the host's memory and are copied over the old ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from salver.model.encoder import Encoder
from salver.model.encoder_config import read_any_spec
from salver.model.encoder_loader import load_encoder
from salver.model.encoder_spec import EncoderSpec
from salver.model.errors import CheckpointError
from salver.model.loader import load_model
from salver.model.precision import weights_dtype_name
from salver.model.quantized import quantize_model
from salver.model.spec import ModelSpec
from salver.model.transformer import Decoder, Transformer
from salver.server.engine.config import EngineConfig
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.encoder_startup import encoder_dtype, use_kernels
from salver.server.engine.runner import ModelRunner
from salver.server.engine.startup import DTYPES, decoder_of

if TYPE_CHECKING:
    from salver.model.kernels.encoder_program import NativeEncoder

HOST = torch.device("cpu")


class UnsupportedChange(Exception):
    """The weights of this engine cannot be replaced while it computes; the message says why."""


@dataclass(frozen=True, slots=True)
class StagedWeights:
    """`base` is what adapters are read for, `model` what computes them once `install` is called."""

    base: Transformer | Encoder
    model: Decoder | NativeEncoder | Encoder
    install: Callable[[], None]


def stage_decoder(runner: ModelRunner, config: EngineConfig, directory: Path, threads: int) -> StagedWeights:
    """Raises CheckpointError, naming field or tensor, for what is bad or of another model."""
    check_spec(directory, runner.model.spec)
    name = weights_dtype_name(str(runner.cache.data.dtype).removeprefix("torch."), config.quantization)
    staged = load_model(directory, device=HOST, dtype=DTYPES[name], numerics=config.numerics)
    check_numbers(staged, directory)
    staged.pad_experts(runner.row_multiple)
    live = runner.model
    if runner.device.type != "cpu":
        assert isinstance(live, Transformer)
        if config.quantization != "none":
            quantize_model(staged, config.quantization)

        def copy() -> None:
            torch.cuda.synchronize(live.device)  # a step may be in flight, on another stream
            with torch.inference_mode():
                for own, new in zip(live.stored(), staged.stored(), strict=True):
                    own.copy_(new)
                    runner.progress()
            live.checkpoint = staged.checkpoint
            torch.cuda.synchronize(live.device)

        return StagedWeights(staged, live, copy)
    adapters = () if runner.adapters is None else tuple(runner.adapters.adapters.values())
    decoder, _ = decoder_of(config, staged, runner.cache, threads, adapters)

    def replace() -> None:
        runner.replace_model(decoder)

    return StagedWeights(staged, decoder, replace)


def stage_encoder(
    runner: EncoderRunner, config: EngineConfig, directory: Path, threads: int
) -> StagedWeights:
    """As `stage_decoder`; and UnsupportedChange."""
    spec = runner.model.spec
    check_spec(directory, spec)
    if runner.has_dense:
        raise UnsupportedChange("not of a model with dense modules after its pooling")
    staged = load_encoder(directory, spec, device=runner.device, dtype=encoder_dtype(config, runner.device))
    check_numbers(staged, directory)
    computing, _ = use_kernels(config, staged, threads)

    def replace() -> None:
        runner.model = computing

    return StagedWeights(staged, computing, replace)


def check_spec(directory: Path, served: ModelSpec | EncoderSpec) -> None:
    """Raises CheckpointError, naming the first field in which the checkpoint differs.

    Which tokens begin and end a text is the front's, and stays as it is.
    """
    found = read_any_spec(directory)
    if type(found) is not type(served):
        raise CheckpointError(
            f"{directory}/config.json: it is a {found.architecture}, a {served.architecture} is served"
        )
    for field in dataclasses.fields(served):
        new, old = getattr(found, field.name), getattr(served, field.name)
        if new != old and "token_id" not in field.name:
            raise CheckpointError(
                f"{directory}/config.json: {field.name} is {new!r:.200}, but {old!r:.200} in what is served"
            )


def check_numbers(model: nn.Module, directory: Path) -> None:
    """Raises CheckpointError for a tensor with NaN or infinity: who trained it went astray."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{directory}: the weights of {name} hold NaN or infinity")
