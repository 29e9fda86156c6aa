"""From a configuration to a warm engine, for an encoder: no cache, no sampling, no speculation."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from salver.model.adapters import AdapterSet
from salver.model.encoder import Encoder
from salver.model.encoder_config import read_any_spec
from salver.model.encoder_loader import load_encoder
from salver.model.encoder_spec import EncoderSpec
from salver.model.errors import CheckpointError
from salver.model.kernels.build import KernelUnavailable
from salver.model.layers import Linear
from salver.model.numerics import row_multiple_of
from salver.server.engine.adapter_startup import facts_of, load_adapters
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.encoder_runner import EncoderRunner
from salver.server.engine.request import Measured, Ready
from salver.server.engine.roofline import held_bytes, measure_roofline
from salver.server.engine.sizes import STEP_SECONDS, WARM_UP_RUNS, WARM_UP_TOKENS
from salver.server.engine.startup import (
    BLOCK_SIZE,
    DTYPES,
    PhaseTimer,
    StartError,
    describe,
    find_device,
    load_dense,
    start_engine,
    use_threads,
    weights_directory,
)
from salver.server.engine.status_page import StatusPage

if TYPE_CHECKING:
    from salver.model.kernels.encoder_program import NativeEncoder

MAX_INPUTS = 256  # in one step, unless told
# A step of a CPU is as fast a token with some hundred tokens as with thousands, and short ones let the front
# read and answer some calls while others are computed.
CPU_STEP_SECONDS = 0.1
NO_BLOCKS = 2  # the smallest pool; whole inputs never take from it


def start_any_engine(
    config: EngineConfig, page: StatusPage, phases: list[tuple[str, float]], begin: float
) -> tuple[EngineCore, Ready]:
    """`start_engine` for a decoder, `start_encoder` for an encoder. Raises StartError."""
    try:
        spec = read_any_spec(Path(config.checkpoint))
    except CheckpointError as error:
        raise StartError(str(error)) from error
    if isinstance(spec, EncoderSpec):
        return start_encoder(config, spec, page, phases, begin)
    if spec.encoder is not None and config.dtype == "auto" and find_device(config).type == "cpu":
        # A source is read once: that can be exact. In torch only float32 promises the same tokens in any
        # company, and translation is short enough for it in the kernel too.
        config = replace(config, dtype="float32")
    return start_engine(config, page, phases, begin)


def start_encoder(
    config: EngineConfig, spec: EncoderSpec, page: StatusPage, phases: list[tuple[str, float]], begin: float
) -> tuple[EngineCore, Ready]:
    """Loads the checkpoint and makes a core ready to step; see `start_engine`. Raises StartError."""
    timer = PhaseTimer(phases, page, begin)
    _refuse_flags(config)
    device = find_device(config)
    threads = use_threads(config)
    model, dense = _load(config, spec, device), load_dense(config, spec.hidden_size)
    parameters, dtype, loaded = model.num_parameters(), model.dtype, model.loaded
    timer.done("load weights")
    loaded_adapters, lost = load_adapters(config, model)
    if config.adapters:
        timer.done("load adapters")
    computing, kernels = use_kernels(config, model, threads)
    native = kernels == "native"
    timer.done("pack weights" if native else "choose kernels")
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    multiple = 1 if native or config.numerics == "fast" else row_multiple_of(linear)
    timer.done("probe numerics")
    max_model_len = config.max_model_len or spec.max_input_tokens
    if max_model_len > spec.max_input_tokens:
        raise StartError(f"--max-model-len {max_model_len}: the model reads at most {spec.max_input_tokens}")
    adapters = None
    if config.adapters or config.more_adapters:
        adapters = AdapterSet(model, loaded_adapters, multiple)
    runner = EncoderRunner(
        computing, row_multiple=multiple, dense=dense, on_progress=page.bump, adapters=adapters
    )
    max_num_seqs = config.max_num_seqs or MAX_INPUTS
    speed = _speed(runner, max_model_len)
    budget = config.max_num_batched_tokens or _token_budget(speed, max_num_seqs, device)
    if budget < max_num_seqs:
        raise StartError(
            f"--max-num-batched-tokens ({budget}) must be at least --max-num-seqs ({max_num_seqs}): "
            "every input is a token at least"
        )
    timer.done("warm up")
    stored = computing.stored()
    roofline = measure_roofline(stored, dtype, device, config.quantization)
    measured = Measured(loaded, held_bytes(stored), roofline, speed, 0.0)
    timer.done("measure the device")
    limits = EngineLimits(
        num_blocks=NO_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        priority_interval=config.priority_interval,
        enable_prefix_caching=False,
        check_integrity=config.check_integrity,
    )
    ready = describe(
        config, limits, device, dtype, threads=threads, multiple=multiple, kernels=kernels,
        num_parameters=parameters, phases=phases, measured=measured,
        adapters=() if adapters is None else tuple(facts_of(*item) for item in adapters.adapters.items()),
        lost_adapters=lost,
    )  # fmt: skip
    # The front sees the null block alone: there is no cache.
    return EngineCore(runner, limits, clock=time.monotonic), replace(ready, num_blocks=1)


def _refuse_flags(config: EngineConfig) -> None:
    """Flags that would do nothing. Raises StartError."""
    if config.kv_cache_memory is not None:
        raise StartError("--kv-cache-memory: an encoder has no key-value cache")
    if config.tensor_parallel_size > 1:
        raise StartError("--tensor-parallel-size: not implemented for encoders")
    if config.speculation == "draft":
        raise StartError("--speculative-model: an encoder generates nothing")


def encoder_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """float32 on a CPU unless told: who reads embeddings compares numbers, and it is as fast there."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return auto if config.dtype == "auto" else DTYPES[config.dtype]


def _load(config: EngineConfig, spec: EncoderSpec, device: torch.device) -> Encoder:
    dtype = encoder_dtype(config, device)
    try:
        return load_encoder(weights_directory(config), spec, device=device, dtype=dtype)
    except CheckpointError as error:
        raise StartError(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartError(f"the weights do not fit in the memory of {device}: {error}") from error


def use_kernels(config: EngineConfig, model: Encoder, threads: int) -> tuple[Encoder | NativeEncoder, str]:
    """What computes the steps, and its name: "native", or "torch" and why. Raises StartError.

    A model that the native kernel does not know as a whole gives it the products alone.
    """
    if config.quantization in ("int4", "fp8"):
        raise StartError(f"--quantization {config.quantization}: not implemented for encoders; int8 is")
    quantized = config.quantization != "none"
    if config.kernels == "torch":
        if quantized:
            raise StartError(f"--quantization {config.quantization}: it needs --kernels native or auto")
        return model, "torch"
    try:
        if config.adapters or config.more_adapters:
            raise KernelUnavailable("it does not do adapters of encoders")
        if not config.kernel_library:
            raise KernelUnavailable(config.no_kernel or "it is for the CPU")
        from salver.model.kernels.encoder_program import NativeEncoder, unsupported
        from salver.model.kernels.library import Library, Precision
        from salver.model.kernels.linear import use_native_products

        library = Library(Path(config.kernel_library))
        reason = unsupported(model.spec)
        if reason is not None and not quantized:
            use_native_products(model, library, threads)
            return model, "native"
        precision = Precision.FLOAT32 if model.dtype == torch.float32 else Precision.BFLOAT16
        if quantized:
            precision = Precision[config.quantization.upper()]
        return NativeEncoder(model, library, precision=precision, threads=threads), "native"
    except KernelUnavailable as error:
        if config.kernels == "native":
            raise StartError(f"--kernels native: {error}") from error
        if quantized:
            raise StartError(
                f"--quantization {config.quantization} needs the native kernel: {error}"
            ) from error
        return model, f"torch ({error})"


def _speed(runner: EncoderRunner, max_model_len: int) -> float:
    """Tokens a second: of the best of some short runs."""
    length = min(WARM_UP_TOKENS, max_model_len)
    return length / min(runner.measure([length]) for _ in range(1 + WARM_UP_RUNS))


def _token_budget(speed: float, max_num_seqs: int, device: torch.device) -> int:
    """Tokens of a step that takes about so long, at so many a second."""
    seconds = CPU_STEP_SECONDS if device.type == "cpu" else STEP_SECONDS
    return max(128, max_num_seqs, min(int(speed * seconds) // 64 * 64, 16384))
