"""The dense maps behind a checkpoint's pooling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .embedding_spec import EmbeddingSpec
from .errors import CheckpointError
from .weights import open_weights

_ACTIVATIONS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "identity": lambda vector: vector,
    "tanh": np.tanh,
    "relu": lambda vector: np.maximum(vector, 0),
}


class DenseModules:
    """Applies them to one vector at a time, so that nobody's depends on another's."""

    def __init__(self, checkpoint: Path, spec: EmbeddingSpec, hidden_size: int) -> None:
        """Raises CheckpointError, naming the file and the tensor, for what is missing or of another shape."""
        self._maps: list[tuple[NDArray[np.float32], NDArray[np.float32] | None, str]] = []
        width = len(spec.pooling) * hidden_size
        for dense in spec.dense:
            folder = checkpoint / dense.directory
            if dense.in_features != width:
                raise CheckpointError(
                    f"{folder}: in_features is {dense.in_features}, the vector before it {width}"
                )
            width = dense.out_features
            names = {"linear.weight": (dense.out_features, dense.in_features)}
            if dense.bias:
                names["linear.bias"] = (dense.out_features,)  # type: ignore[assignment]
            files = open_weights(folder)
            if files.keys() != names.keys():
                raise CheckpointError(f"{folder}: its tensors are {sorted(files)}, not {sorted(names)}")
            arrays = [files[name].read(name).to(torch.float32).numpy() for name in names]
            for name, array in zip(names, arrays, strict=True):
                if array.shape != names[name]:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {array.shape}, {names[name]} was expected"
                    )
            self._maps.append((arrays[0], arrays[1] if dense.bias else None, dense.activation))

    def __call__(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """[dimensions] of a pooled vector."""
        for weight, bias, activation in self._maps:
            product = weight @ vector
            vector = _ACTIVATIONS[activation](product if bias is None else product + bias)
        return vector
