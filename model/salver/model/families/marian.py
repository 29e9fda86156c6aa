"""Marian (Junczys-Dowmunt et al. 2018): the transformer of Vaswani et al. 2017, post-norm and sinusoidal."""

from __future__ import annotations

from ..config_reader import ConfigReader
from ..spec import ModelSpec, SinusoidalPositions
from . import family
from .bart import bart_spec


@family("MarianMTModel")
def marian(c: ConfigReader) -> ModelSpec:
    waves = SinusoidalPositions(open_end=True)
    own = not c.boolean("share_encoder_decoder_embeddings", True)
    vocab_size = c.size("decoder_vocab_size", c.size("vocab_size"))
    if not own and vocab_size != c.size("vocab_size"):
        raise c.error("decoder_vocab_size", "must be vocab_size where the embeddings are shared")
    return bart_spec(
        c,
        "MarianMTModel",
        embedding_norm=False,
        positions=waves,
        table=None,
        sinusoids=waves,
        start=58100,
        forced_eos=0,
        own_embedding=own,
        vocab_size=vocab_size,
    )
