"""AntiBERTy (Ruffolo et al. 2021): BERT of antibodies' residues, with a masked language model's head."""

from __future__ import annotations

from dataclasses import replace

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec
from . import encoder_family
from .bert import bert


@encoder_family("AntiBERTy")
def antiberty(c: ConfigReader, architecture: str) -> EncoderSpec:
    """Its heads of whole inputs (species, chain, graft) are left alone."""
    spec = bert(c, "BertForMaskedLM")
    others = r"cls\.(species|chain|graft)\..*"
    weights = replace(spec.weights, ignored=(*spec.weights.ignored, others))
    return replace(spec, architecture=architecture, weights=weights)
