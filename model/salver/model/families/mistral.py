"""Mistral 7B and its successors (Jiang et al. 2023): Llama with a sliding window."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec
from . import family
from .llama import llama_spec
from .windows import everywhere


@family("MistralForCausalLM")
def mistral(c: ConfigReader) -> ModelSpec:
    return llama_spec(c, "MistralForCausalLM", windows=everywhere(c.size_or_null("sliding_window", 4096)))
