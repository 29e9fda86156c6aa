"""Rotary positions as config.json describes them, in the forms of transformers 4 and 5. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .config_reader import ConfigReader
from .spec import RopePositions

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_positions(
    c: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_field: str = "rope_theta",
    partial: float | None = None,
    partial_field: str = "partial_rotary_factor",
    renamed: Mapping[str, str] | None = None,
) -> RopePositions:
    """From `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`.

    `theta` and `partial` (the part of a head that rotates; None: all of it, whatever else the config
    asks for is refused) are the family's defaults; `renamed` says what scalings are called now.
    """
    new, old = c.section("rope_parameters"), c.section("rope_scaling")
    if new is not None and old is not None:
        raise c.error("rope_scaling", "stands beside rope_parameters; one of them was expected")
    section = new or old
    return read_rope(
        c, section, head_dim, theta=theta, theta_field=theta_field, partial=partial,
        partial_field=partial_field, renamed=renamed or {},
    )  # fmt: skip


def read_rope(
    c: ConfigReader,
    section: ConfigReader | None,
    head_dim: int,
    *,
    theta: float,
    theta_field: str = "rope_theta",
    partial: float | None = None,
    partial_field: str = "partial_rotary_factor",
    renamed: Mapping[str, str] | None = None,
) -> RopePositions:
    """The same of one section, beside the config `c` that it belongs to."""
    if section is None:
        factor = 1.0 if partial is None else c.fraction(partial_field, partial)
        return RopePositions(c.number(theta_field, theta), rotary_dim=_rotary_dim(c, head_dim, factor))
    within = section.has("rope_theta")
    theta = section.number("rope_theta") if within else c.number(theta_field, theta)
    c.only(theta_field, theta)
    if partial is None:
        section.only("partial_rotary_factor", 1.0)
        factor = 1.0
    else:
        outside = c.fraction(partial_field, partial)
        factor = section.fraction("partial_rotary_factor", outside)
        if c.has(partial_field):
            c.only(partial_field, factor)
    rotary_dim = _rotary_dim(c, head_dim, factor)
    called = renamed or {}
    kinds = (*SCALINGS, *called)
    # Before `rope_type` it was called `type`; some checkpoints hold both.
    kind = section.choice("rope_type", kinds, section.choice("type", kinds, "default"))
    kind = called.get(kind, kind)
    rope = _scaled(c, section, RopePositions(theta, kind, rotary_dim=rotary_dim), rotary_dim or head_dim)
    section.refuse_unread()
    return rope


def _rotary_dim(c: ConfigReader, head_dim: int, factor: float) -> int:
    """Values of a head that rotate, 0 for all."""
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or rotary_dim == 0:
        raise c.error(
            "head_dim" if rotary_dim == head_dim else "partial_rotary_factor",
            f"must be even for rotary positions, not {rotary_dim}"
            if rotary_dim == head_dim
            else f"makes {rotary_dim} values of a head rotate; an even number was expected",
        )
    return 0 if rotary_dim == head_dim else rotary_dim


def _scaled(c: ConfigReader, section: ConfigReader, rope: RopePositions, dim: int) -> RopePositions:
    """With what the section says of its kind of scaling."""
    kind = rope.scaling
    if kind == "default":
        section.only("factor", 1.0)
        # What longrope needs stands in such sections too (Phi-3), and says nothing here.
        section.ignore("original_max_position_embeddings")
        return rope
    if kind == "linear":
        return replace(rope, factor=section.number("factor"))
    if kind == "dynamic":
        if dim <= 2:
            raise section.error("rope_type", f"'dynamic' needs more than {dim} rotating values in a head")
        return replace(
            rope,
            factor=section.number("factor"),
            original_max_position_embeddings=c.size("max_position_embeddings"),
        )
    if kind == "llama3":
        rope = replace(
            rope,
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_position_embeddings=_original(c, section),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise section.error("high_freq_factor", "must be above low_freq_factor")
        return rope
    original = _original(c, section)
    if original < 2:
        raise section.error("original_max_position_embeddings", f"must be above 1, not {original}")
    factor = section.number("factor", c.size("max_position_embeddings") / original)
    rope = replace(rope, factor=factor, original_max_position_embeddings=original)
    return _yarn(section, rope) if kind == "yarn" else _longrope(section, rope, dim)


def _original(c: ConfigReader, section: ConfigReader) -> int:
    """The context that the model was trained with first."""
    if c.has("original_max_position_embeddings"):
        original = c.size("original_max_position_embeddings")
        section.only("original_max_position_embeddings", original)
        return original
    return section.size("original_max_position_embeddings", c.size("max_position_embeddings"))


def _yarn(section: ConfigReader, rope: RopePositions) -> RopePositions:
    def mscale(factor: float, m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    one, all_dim = (section.number(name, 0.0, zero=True) for name in ("mscale", "mscale_all_dim"))
    usual = (
        mscale(rope.factor, one) / mscale(rope.factor, all_dim) if one and all_dim else mscale(rope.factor, 1)
    )
    return replace(
        rope,
        attention_factor=section.number("attention_factor", usual),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.boolean("truncate", True),
    )


def _longrope(section: ConfigReader, rope: RopePositions, dim: int) -> RopePositions:
    usual = 1.0
    if rope.factor > 1:
        usual = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    short, long = section.numbers("short_factor"), section.numbers("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != dim // 2:
            raise section.error(name, f"has {len(factors)} values, {dim // 2} were expected")
    return replace(
        rope,
        attention_factor=section.number("attention_factor", usual),
        short_factors=short,
        long_factors=long,
    )


def grown_context(context: int, ropes: tuple[RopePositions, ...]) -> int:
    """The context in tokens that ropes stretch `max_position_embeddings` to."""
    for rope in ropes:
        if rope.scaling in ("dynamic", "yarn"):
            context = max(context, int(rope.factor * rope.original_max_position_embeddings))
    return context
