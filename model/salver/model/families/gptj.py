"""GPT-J (Wang & Komatsuzaki 2021) and CodeGen (Nijkamp et al. 2022): attention and MLP side by side, rotary
pairs."""

from __future__ import annotations

from typing import Any

from ..config_reader import ConfigReader
from ..spec import Cat, Copy, ModelSpec, RopePositions, Source, Split
from ..weight_names import Names, paired_qkv, unpaired
from . import family
from .gpt2 import GPT2, MASKS, gpt_spec

GPTJ: Names = {
    **GPT2,
    "attention_out": "h.{layer}.attn.out_proj",
    "up": "h.{layer}.mlp.fc_in",
    "down": "h.{layer}.mlp.fc_out",
}
CODEGEN_PARTS = 4  # CodeGen's q, v, k come in four runs, as its training was split over four devices


@family("GPTJForCausalLM")
def gptj(c: ConfigReader) -> ModelSpec:
    heads, head_dim, rotary_dim = _heads(c)
    projections = ("h.{layer}.attn.q_proj", "h.{layer}.attn.k_proj", "h.{layer}.attn.v_proj")
    names = {**GPTJ, "qkv": paired_qkv(projections, heads, heads, head_dim, rotary_dim)}
    c.only("rotary", True)
    c.only("scale_attn_weights", True)
    return _spec(c, "GPTJForCausalLM", names)


@family("CodeGenForCausalLM")
def codegen(c: ConfigReader) -> ModelSpec:
    heads, head_dim, rotary_dim = _heads(c)
    if heads % CODEGEN_PARTS:
        raise c.error("n_head", f"({heads}) must be divisible by {CODEGEN_PARTS}")
    run = heads * head_dim // CODEGEN_PARTS
    c.only("scale_attn_weights", True)

    def qkv(kind: str) -> Source:
        whole = Copy(f"h.{{layer}}.attn.qkv_proj.{kind}")
        query, value, key = (Split(whole, (run, run, run), i, groups=CODEGEN_PARTS) for i in range(3))
        turned = (unpaired(part, heads, head_dim, rotary_dim) for part in (query, key))
        return Cat((*turned, value), (heads * head_dim,) * 3)

    return _spec(c, "CodeGenForCausalLM", {**GPTJ, "qkv": qkv})


def _heads(c: ConfigReader) -> tuple[int, int, int]:
    """Heads, their size, and how much of it rotates."""
    heads = c.size("n_head")
    head_dim = c.size("n_embd") // heads
    rotary_dim = c.size("rotary_dim", head_dim if c.is_null("rotary_dim") else 64)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise c.error(
            "rotary_dim", f"({rotary_dim}) must be even and at most the size of a head ({head_dim})"
        )
    return heads, head_dim, rotary_dim


def _spec(c: ConfigReader, architecture: str, names: Names) -> ModelSpec:
    _, head_dim, rotary_dim = _heads(c)
    c.only("tie_word_embeddings", False)  # the head has a bias of its own
    differences: dict[str, Any] = {
        "tied_head": False,
        "positions": RopePositions(10000.0, rotary_dim=0 if rotary_dim == head_dim else rotary_dim),
        "parallel": True,
        "shared_norm": True,
        "qkv_bias": False,
        "attention_out_bias": False,
        "head_bias": True,
    }
    return gpt_spec(c, architecture, names, optional_prefix="transformer.", ignored=MASKS, **differences)
