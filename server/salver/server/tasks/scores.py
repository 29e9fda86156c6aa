"""Activations of heads."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Activation(enum.Enum):
    """What makes scores of a head's numbers."""

    IDENTITY = "identity"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


def activation_of(problem_type: str, num_labels: int) -> Activation:
    """As transformers' pipelines choose it: by the config, else by the number of labels."""
    if problem_type == "regression":
        return Activation.IDENTITY
    if problem_type == "multi_label_classification" or num_labels == 1:
        return Activation.SIGMOID
    return Activation.SOFTMAX


def activated(logits: Array, activation: Activation) -> Array:
    """float64, the shape of `logits`; softmax is over the last dimension."""
    wide = logits.astype(np.float64)
    if activation is Activation.IDENTITY:
        return wide
    if activation is Activation.SIGMOID:
        return np.asarray(1 / (1 + np.exp(-wide)))
    exponents = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def ranked(scores: Array, count: int | None = None) -> list[int]:
    """Indices, best first; equal ones in their order; `count` of them."""
    order = np.argsort(-scores, kind="stable")
    return [int(i) for i in order[:count]]
