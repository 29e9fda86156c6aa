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
    quantization: str = "none"  # none | int8 | int4
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
    enable_prefix_caching: bool = True
    priority_interval: float = 1.0  # seconds of waiting that one priority level is worth
    weights_digest: str = ""
    check_integrity: bool = False  # after every step, for tests
    speculation: str = "off"  # off | ngram | draft
    num_draft_tokens: int = 4  # at most, for each sequence in a step
    speculative_model: str = ""  # for draft: its checkpoint directory
    adapters: tuple[AdapterSource, ...] = ()
    more_adapters: bool = False  # others may be loaded later
