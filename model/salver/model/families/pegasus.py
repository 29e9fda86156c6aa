"""Pegasus (Zhang et al. 2019) and Blenderbot (Roller et al. 2020): BART with its norms before the blocks."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import PositionTable
from ..spec import LearnedPositions, ModelSpec, SinusoidalPositions
from . import family
from .bart import bart_spec


@family("PegasusForConditionalGeneration")
def pegasus(c: ConfigReader) -> ModelSpec:
    waves = SinusoidalPositions(open_end=True)
    return bart_spec(
        c,
        "PegasusForConditionalGeneration",
        norm_before=True,
        embedding_norm=False,
        positions=waves,
        table=None,
        sinusoids=waves,
        start=0,
        forced_eos=1,
    )


@family("BlenderbotForConditionalGeneration")
def blenderbot(c: ConfigReader) -> ModelSpec:
    c.only("layernorm_variant", "prelayernorm")
    c.only("do_blenderbot_90_layernorm", True)
    return bart_spec(
        c,
        "BlenderbotForConditionalGeneration",
        norm_before=True,
        embedding_norm=False,
        positions=LearnedPositions(),
        table=PositionTable(),
        start=1,
        forced_eos=2,
        context=128,
        sizes={
            "d_model": 2560,
            "encoder_layers": 2,
            "decoder_layers": 24,
            **{f"{side}_attention_heads": 32 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 10240 for side in ("encoder", "decoder")},
        },
    )
