"""From a checkpoint directory to an encoder on its device, as `loader` does for decoders."""

from __future__ import annotations

from pathlib import Path

import torch

from .encoder import Encoder
from .encoder_spec import EncoderSpec
from .loader import fill_parameters


def load_encoder(checkpoint: Path, spec: EncoderSpec, *, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder of a checkpoint directory, ready to compute. Raises as `load_model` does."""
    with torch.device("meta"):
        model = Encoder(spec)
    model.eval()
    model.place(device)
    model.loaded = fill_parameters(
        model, checkpoint, spec.weights, spec.num_layers, spec.architecture, dtype=dtype, device=device
    )
    model.prepare()
    model.checkpoint = checkpoint
    return model
