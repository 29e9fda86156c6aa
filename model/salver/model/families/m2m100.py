"""M2M-100 (Fan et al. 2020) and NLLB-200 (NLLB Team 2022): pre-norm, fairseq's sinusoids."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..encoder_spec import PositionTable
from ..spec import ModelSpec, SinusoidalPositions
from . import family
from .bart import bart_spec


@family("M2M100ForConditionalGeneration")
def m2m100(c: ConfigReader) -> ModelSpec:
    pad = c.integer("pad_token_id", 1)
    return bart_spec(
        c,
        "M2M100ForConditionalGeneration",
        norm_before=True,
        embedding_norm=False,
        positions=SinusoidalPositions(offset=pad + 1, zero=pad),
        table=PositionTable(pad + 1, pad),
        sinusoids=SinusoidalPositions(zero=pad),
        activation="relu",
        scaled=True,
        start=2,
        logit_bias=False,
    )
