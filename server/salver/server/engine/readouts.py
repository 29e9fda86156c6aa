"""What an `encoding` request reads of the hidden states, chunk by chunk; numpy on the worker's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from salver.model.pooling import Pool
from salver.model.sampling import StepDistribution
from salver.model.spec import ModelSpec
from salver.server.engine.core import RowResult
from salver.server.engine.request import Readout
from salver.server.engine.schedule import Scheduled

Dense = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def read_states(item: Scheduled, hidden: NDArray[np.float32], result: RowResult, dense: Dense | None) -> None:
    """TOKENS and EMBEDDING of the part's hidden states [n, hidden_size]; arrays once all is computed.

    Leaves the sequence alone: what was read so far goes into the result, so that the part can be
    computed again.
    """
    sequence = item.sequence
    encoding = sequence.request.encoding
    assert encoding is not None
    if not np.isfinite(hidden).all():
        result.error = "the model's hidden states are not numbers"
        return
    ends = item.start + item.num_tokens == sequence.num_tokens
    if encoding.readout is Readout.TOKENS:
        chunks = (*cast(tuple[NDArray[np.float32], ...], sequence.partial or ()), hidden)
        result.partial = chunks
        if ends:
            result.arrays = (np.concatenate(chunks),)
        return
    pool = (cast(Pool | None, sequence.partial) or Pool(encoding.pooling)).add(hidden)
    result.partial = pool
    if ends:
        vector = pool.vector()
        result.arrays = (vector if dense is None else dense(vector),)


def read_scores(
    item: Scheduled,
    spec: ModelSpec,
    hidden: Tensor,
    first_row: int,
    classify: Callable[[Tensor], Tensor],
    result: RowResult,
) -> None:
    """SCORES of a decoder: of the last token, or of the part's tokens; arrays once all is computed.

    The part's rows begin at `first_row` of the step's hidden states [N, hidden_size].
    """
    sequence, classifier = item.sequence, spec.classifier
    assert classifier is not None
    rows = range(item.num_tokens)
    if classifier.reads == "input":
        place = classifier.place(sequence.token_ids) - item.start
        rows = range(place, place + 1) if 0 <= place < item.num_tokens else range(0)
    chunks = cast(tuple[NDArray[np.float32], ...], sequence.partial or ())
    if rows:
        found = classify(hidden[first_row + rows.start : first_row + rows.stop]).cpu().numpy()
        if not np.isfinite(found).all():
            result.error = "the head's scores are not numbers"
            return
        chunks = (*chunks, found)
    result.partial = chunks
    if item.start + item.num_tokens == sequence.num_tokens:
        scores = np.concatenate(chunks)
        result.arrays = (scores[0] if classifier.reads == "input" else scores,)


def distribution_arrays(steps: Sequence[StepDistribution], top_k: int) -> tuple[NDArray[Any], ...]:
    """What Readout.DISTRIBUTION promises."""
    ids = np.full((len(steps), top_k), -1, dtype=np.int64)
    probabilities = np.zeros((len(steps), top_k))
    for row, step in enumerate(steps):
        ids[row, : len(step.token_ids)] = step.token_ids
        probabilities[row, : len(step.token_ids)] = step.probabilities
    return (
        np.array([step.name for step in steps]),
        ids,
        probabilities,
        np.array([step.num_tokens for step in steps], dtype=np.int64),
        np.array([(step.removed_mass, step.entropy) for step in steps]),
    )


def put_attention(weights: NDArray[np.float32], result: RowResult) -> None:
    """What Readout.ATTENTION promises."""
    if np.isfinite(weights).all():
        result.arrays = (weights,)
    else:
        result.error = "the model's attention weights are not numbers"
