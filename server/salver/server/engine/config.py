"""What the worker is told at its start, and nothing else; plain data."""

from __future__ import annotations

from dataclasses import dataclass

from salver.server.engine.changes import AdapterSource


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of the engine. None leaves the choice to the worker, which knows the device.

    `checkpoint` is a Hugging Face style directory (config.json, *.safetensors or *.bin):
    GGUF files are converted to one before the worker starts. Sizes in bytes and tokens.
    """

    checkpoint: str
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "none"  # none | int8 | int4 | fp8
    numerics: str = "exact"  # exact | fast
    kernels: str = "torch"  # auto | native | torch
    kernel_library: str = ""  # the native kernel's path; empty: there is none, for this reason:
    no_kernel: str = ""
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    block_size: int | None = None
    tensor_parallel_size: int = 1  # processes that share the model, each on a GPU of its own
    cuda_graphs: bool = True
    cache_dir: str = ""  # for lists of captured graphs; empty: none are kept
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory, for weights, steps and cache
    enable_prefix_caching: bool = True
    priority_interval: float = 1.0  # seconds of waiting that one priority level is worth
    weights: str = ""  # a directory of other weights than the checkpoint's, which came later; empty: none
    weights_digest: str = ""  # of the weights in force
    check_integrity: bool = False  # after every step, for tests
    speculation: str = "off"  # off | ngram | draft
    speculation_chosen: bool = False  # nobody asked for it: where it costs more than it brings it is off
    num_draft_tokens: int = 4  # at most, for each sequence in a step
    speculative_model: str = ""  # for draft: its checkpoint directory
    adapters: tuple[AdapterSource, ...] = ()
    more_adapters: bool = False  # others may be loaded later
    max_adapter_rank: int | None = None
