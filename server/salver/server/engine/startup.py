"""From a configuration to a warm engine: device, weights, cache, sizes, each phase timed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch

from salver.model.adapters import Adapter, AdapterSet
from salver.model.cache import KVCache
from salver.model.checkpoint import weights_digest
from salver.model.embedding_modules import DenseModules
from salver.model.embedding_spec import read_embedding_spec
from salver.model.errors import CheckpointError
from salver.model.kernels import build
from salver.model.kernels.build import KernelUnavailable
from salver.model.loader import load_model
from salver.model.numerics import default_dtype, numerics_id, row_multiple
from salver.model.parallel import Ranks
from salver.model.precision import weights_dtype_name
from salver.model.spec import ModelSpec
from salver.model.transformer import Decoder, SourceDecoder, Transformer
from salver.server.engine.adapter_startup import facts_of, load_adapters
from salver.server.engine.changes import AdapterFacts
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore, EngineLimits
from salver.server.engine.device_startup import (
    BLOCK_SIZE as BLOCK_SIZE,
)
from salver.server.engine.device_startup import (
    choose_block_size,
    decode_graphs,
    fix_rows,
    make_cache,
    overlaps,
    quantize_weights,
    start_ranks,
)
from salver.server.engine.draft_model import DraftModel
from salver.server.engine.drafts import PromptLookup, Speculation, StepCosts
from salver.server.engine.errors import StartError as StartError
from salver.server.engine.grammar import Grammars, load_vocabulary
from salver.server.engine.launching import LaunchingModelRunner
from salver.server.engine.overlap import OverlappedCore
from salver.server.engine.ranks import PadExperts, ParallelTransformer
from salver.server.engine.request import Measured, Ready
from salver.server.engine.roofline import held_bytes, measure_roofline
from salver.server.engine.runner import ModelRunner
from salver.server.engine.sizes import (
    DEFAULT_NUM_SEQS,
    max_model_len_of,
    num_blocks_of,
    speed_of,
    token_budget,
)
from salver.server.engine.source_reader import SourceReader
from salver.server.engine.status_page import StatusPage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COST_ROWS = (1, 8, 32)  # steps of so many sequences are timed, to know what a draft costs


def start_engine(
    config: EngineConfig, page: StatusPage, phases: list[tuple[str, float]], begin: float
) -> tuple[EngineCore, Ready]:
    """Loads the checkpoint and makes a core ready to step.

    `phases` holds what the caller has timed, up to `begin` (of time.perf_counter). Raises StartError.
    """
    timer = PhaseTimer(phases, page, begin)
    device = find_device(config)
    threads = use_threads(config)
    dtype = default_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    group = start_ranks(config, device)
    weights = str(weights_directory(config))
    model = _load(config, weights, device, dtype, None if group is None else group.ranks)
    quantize_weights(config, model)
    spec, loaded = model.spec, model.loaded
    _refuse_flags(config, spec)
    draft = _load_draft(config, spec, device, dtype) if config.speculation == "draft" else None
    timer.done("load weights")
    max_model_len = max_model_len_of(config, spec)
    block_size = config.block_size or choose_block_size(model)
    max_num_seqs = config.max_num_seqs or DEFAULT_NUM_SEQS[device.type]
    parallel = None if group is None else ParallelTransformer.of(model, group)
    num_blocks = num_blocks_of(config, model, parallel, draft, dtype, block_size, max_model_len, max_num_seqs)
    try:
        cache = make_cache(model, parallel, num_blocks, block_size, dtype)
    except (MemoryError, RuntimeError) as error:
        raise StartError(f"--kv-cache-memory: the cache could not be allocated: {error}") from error
    timer.done("allocate cache")
    loaded_adapters, lost = load_adapters(config, model)
    if config.adapters:
        timer.done("load adapters")
    if parallel is None:
        decoder, kernels = decoder_of(config, model, cache, threads, tuple(loaded_adapters.values()))
    else:
        decoder, kernels = parallel, f"torch ({config.tensor_parallel_size} ranks)"
    native = kernels == "native"
    timer.done("pack weights" if native else "choose kernels")
    # The kernel's rows don't know one another; torch's may.
    fixed = 0 if native else fix_rows(config, model)
    multiple = 1 if native or fixed or config.numerics == "fast" else row_multiple(model)
    model.pad_experts(multiple)
    if group is not None:
        group.send(PadExperts(multiple))
    timer.done("probe numerics")
    adapters = None
    if config.adapters or config.more_adapters:
        adapters = AdapterSet(decoder, loaded_adapters, multiple)
    grammars = Grammars(lambda: load_vocabulary(Path(config.checkpoint)), beside=model.device.type != "cpu")
    runner = LaunchingModelRunner(
        decoder,
        cache,
        block_size=block_size,
        row_multiple=multiple,
        on_progress=page.bump,
        dense=load_dense(config, spec.hidden_size),
        grammars=grammars,
        adapters=adapters,
        sources=None
        if spec.encoder is None
        else SourceReader(cast(SourceDecoder, decoder), cache, row_multiple=multiple, on_progress=page.bump),
    )
    runner.graphs = decode_graphs(config, runner, device_name(device), max_num_seqs, max_model_len)
    speed, one = speed_of(runner, max_model_len)
    budget = config.max_num_batched_tokens or token_budget(speed, max_num_seqs)
    if budget < max_num_seqs:
        raise StartError(
            f"--max-num-batched-tokens ({budget}) must be at least --max-num-seqs ({max_num_seqs}): "
            "every running sequence computes a token a step"
        )
    timer.done("warm up")
    stored = decoder.stored()
    roofline = measure_roofline(stored, dtype, device, config.quantization)
    measured = Measured(loaded, held_bytes(stored), roofline, speed, one)
    timer.done("measure the device")
    overlapped = overlaps(config, device, spec)
    speculation = None if overlapped else _speculation(config, runner, draft, num_blocks, threads, budget)
    if speculation is not None:
        timer.done("time steps")
    limits = EngineLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        tokens_for_one=max(1, int(speed / one)),
        priority_interval=config.priority_interval,
        rope_context=spec.rope_context,
        max_source_len=0 if spec.encoder is None else spec.encoder.max_input_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        check_integrity=config.check_integrity,
    )
    ready = describe(
        config, limits, device, dtype, threads=threads, multiple=multiple, kernels=kernels,
        num_parameters=decoder.num_parameters(), phases=phases, measured=measured,
        adapters=() if adapters is None else tuple(facts_of(*item) for item in adapters.adapters.items()),
        lost_adapters=lost, fixed_rows=fixed,
    )  # fmt: skip
    grammars.warm_beside()
    if overlapped:
        return OverlappedCore(runner, limits, clock=time.monotonic), ready
    return EngineCore(runner, limits, clock=time.monotonic, speculation=speculation), ready


def describe(
    config: EngineConfig,
    limits: EngineLimits,
    device: torch.device,
    dtype: torch.dtype,
    *,
    threads: int,
    multiple: int,
    kernels: str,
    num_parameters: int,
    phases: list[tuple[str, float]],
    measured: Measured,
    adapters: tuple[AdapterFacts, ...] = (),
    lost_adapters: tuple[tuple[str, str], ...] = (),
    fixed_rows: int = 0,
) -> Ready:
    """What the front is told of a warm engine; `kernels` is "native", or torch and why."""
    return Ready(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.quantization,
        torch_version=str(torch.__version__),  # a plain string: its own type would bring torch to the front
        kernels=kernels,
        numerics_id=numerics_id_of(config, device, dtype, threads, multiple, kernels, fixed_rows),
        num_parameters=num_parameters,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        phases=tuple(phases),
        fixed_rows=fixed_rows,
        adapters=adapters,
        lost_adapters=lost_adapters,
        measured=measured,
    )


def numerics_id_of(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    multiple: int,
    kernels: str,
    fixed_rows: int = 0,
) -> str:
    """See `numerics.numerics_id`; `kernels` as `describe` has it."""
    return numerics_id(
        device,
        dtype,
        weights_digest=config.weights_digest,
        quantization=config.quantization,
        numerics=config.numerics,
        threads=threads,
        row_multiple=multiple,
        kernel=build.numerics() if kernels == "native" else "",
        ranks=config.tensor_parallel_size,
        fixed_rows=fixed_rows,
    )


def weights_directory(config: EngineConfig) -> Path:
    """Where the weights are: the checkpoint's, or those that came later. Raises StartError.

    The latter were read once and are promised by their digest, so they are looked at again.
    """
    if not config.weights:
        return Path(config.checkpoint)
    directory = Path(config.weights)
    try:
        with TemporaryDirectory() as nothing_known:
            digest = weights_digest(directory, Path(nothing_known))
    except CheckpointError as error:
        raise StartError(f"the weights that were served cannot be had again: {error}") from error
    if digest != config.weights_digest:
        raise StartError(f"{directory}: the weights have changed since they were served")
    return directory


def _load(
    config: EngineConfig,
    checkpoint: str,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> Transformer:
    try:
        name = weights_dtype_name(str(dtype).removeprefix("torch."), config.quantization)
        return load_model(
            Path(checkpoint), device=device, dtype=DTYPES[name], numerics=config.numerics, ranks=ranks
        )
    except CheckpointError as error:
        raise StartError(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartError(f"the weights do not fit in the memory of {device}: {error}") from error


def _refuse_flags(config: EngineConfig, spec: ModelSpec) -> None:
    """What is not implemented for several ranks and for encoder-decoders. Raises StartError."""
    if config.tensor_parallel_size > 1 and (config.adapters or config.more_adapters):
        raise StartError("--tensor-parallel-size: not implemented with adapters")
    if spec.encoder is None:
        return
    if config.speculation == "draft":
        raise StartError(f"--speculative-model: not implemented for encoder-decoders ({spec.architecture})")


def load_dense(config: EngineConfig, hidden_size: int) -> DenseModules | None:
    """What a sentence-transformers directory does with pooled vectors. Raises StartError."""
    checkpoint = Path(config.checkpoint)
    try:
        embedding = read_embedding_spec(checkpoint)
        return DenseModules(checkpoint, embedding, hidden_size) if embedding.dense else None
    except CheckpointError as error:
        raise StartError(str(error)) from error


def _load_draft(
    config: EngineConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The draft model, whose tokens must be the model's own."""
    try:
        draft = _load(config, config.speculative_model, device, dtype)
    except StartError as error:
        raise StartError(f"--speculative-model: {error}") from error
    if draft.spec.vocab_size != spec.vocab_size:
        raise StartError(
            f"--speculative-model {config.speculative_model}: its vocabulary has {draft.spec.vocab_size} "
            f"tokens, the model's {spec.vocab_size}; they must be the same"
        )
    return draft


def _speculation(
    config: EngineConfig,
    runner: ModelRunner,
    draft: Transformer | None,
    num_blocks: int,
    threads: int,
    budget: int,
) -> Speculation | None:
    if config.speculation == "off":
        return None
    drafter: PromptLookup | DraftModel = PromptLookup()
    if draft is not None:
        dtype, size = runner.cache.data.dtype, runner.block_size
        try:
            cache = KVCache(draft.spec, num_blocks, size, dtype=dtype, device=draft.device)
        except (MemoryError, RuntimeError) as error:
            raise StartError(f"--speculative-model: its cache could not be allocated: {error}") from error
        decoder, kernels = decoder_of(config, draft, cache, threads)
        multiple = 1 if kernels == "native" else runner.row_multiple
        small = ModelRunner(decoder, cache, block_size=size, row_multiple=multiple)
        drafter = DraftModel(small, _step_costs(small, budget), max_tokens=budget)
    return Speculation(drafter, _step_costs(runner, budget), max_drafts=config.num_draft_tokens)


def _step_costs(runner: ModelRunner, budget: int) -> StepCosts:
    rows = [n for n in COST_ROWS if n <= budget]
    # The better of two: the first also warms up.
    return StepCosts([(n, min(runner.measure_decode(n) for _ in range(2))) for n in rows])


class PhaseTimer:
    """Times the parts of the start and gives a sign of life after each."""

    def __init__(self, phases: list[tuple[str, float]], page: StatusPage, begin: float) -> None:
        self._phases = phases
        self._page = page
        self._begin = begin

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self._phases.append((name, now - self._begin))
        self._begin = now
        self._page.bump()


def find_device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise StartError("--device cuda: torch finds no CUDA device here (--device cpu, or auto)")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", 0)


def device_name(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"


def use_threads(config: EngineConfig) -> int:
    """As many threads as this process may use processors, unless told."""
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


def decoder_of(
    config: EngineConfig,
    model: Transformer,
    cache: KVCache,
    threads: int,
    adapters: tuple[Adapter, ...] = (),
) -> tuple[Decoder, str]:
    """What computes the steps, and its name: "native", or "torch" and why. Raises StartError."""
    quantized = config.quantization != "none"
    if model.device.type == "cuda":
        return model, "torch"
    if config.quantization == "fp8":
        raise StartError("--quantization fp8: it is for GPUs (--quantization int8)")
    if config.kernels == "torch":
        if quantized:
            raise StartError(f"--quantization {config.quantization}: it needs --kernels native or auto")
        return model, "torch"
    try:
        if not config.kernel_library:
            raise KernelUnavailable(config.no_kernel or "it is for the CPU")
        if model.encoder is not None and (config.adapters or config.more_adapters):
            raise KernelUnavailable("it does not do adapters of encoder-decoders")
        # Not before it is wanted: a start with torch alone shall not pay for it.
        from salver.model.kernels.adapters import unsupported
        from salver.model.kernels.library import Library, Precision
        from salver.model.kernels.program import NativeTransformer
        from salver.model.kernels.seq2seq import NativeSeq2Seq

        for adapter in adapters:
            if (reason := unsupported(adapter)) is not None:
                raise KernelUnavailable(f"it does not do {reason} in an adapter")
        library = Library(Path(config.kernel_library))
        precision = Precision.FLOAT32 if model.dtype == torch.float32 else Precision.BFLOAT16
        if quantized:
            precision = Precision[config.quantization.upper()]
        kind = NativeTransformer if model.encoder is None else NativeSeq2Seq
        return kind(model, cache, library, precision=precision, threads=threads), "native"
    except KernelUnavailable as error:
        if config.kernels == "native":
            raise StartError(f"--kernels native: {error}") from error
        if quantized:
            raise StartError(
                f"--quantization {config.quantization} needs the native kernel: {error}"
            ) from error
        return model, f"torch ({error})"
