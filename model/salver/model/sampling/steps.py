"""The steps between logits and the distribution that is drawn from, in their order.

Each step knows which rows it concerns and changes the logits of those in place, each row by its own
parameters alone. The cuts work on values (a token is kept if its logit reaches a threshold), so
tokens of equal logits are kept or dropped together, whatever the order of a sort.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from salver.model.sampling.exclusions import allowed_next, ends_of_bad_words, ends_of_ngrams
from salver.model.sampling.rows import SamplingRow
from salver.model.transfer import on_device, tensor_on

CANDIDATES = 256  # of the vocabulary; enough for nearly every top_p, a full sort does the others


@dataclass(frozen=True, slots=True)
class Step:
    """`apply(logits [R, V], rows)` changes logits in place; all the rows concern it."""

    name: str
    concerns: Callable[[SamplingRow], bool]
    apply: Callable[[Tensor, Sequence[SamplingRow]], None]


def _penalties(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition (CTRL, Keskar et al. 2019) over prompt and output; the others over the output."""
    for row, parameters in zip(logits, rows, strict=True):
        if parameters.repetition_penalty != 1.0:
            seen = tensor_on(
                logits.device, sorted({*parameters.prompt_token_ids, *parameters.output_token_ids})
            )
            found = row[seen]
            penalty = parameters.repetition_penalty
            row[seen] = torch.where(found < 0, found * penalty, found / penalty)
        if parameters.output_token_ids and (parameters.presence_penalty or parameters.frequency_penalty):
            counts = Counter(parameters.output_token_ids)
            ids = tensor_on(logits.device, list(counts))
            times = tensor_on(logits.device, list(counts.values()), logits.dtype)
            row[ids] -= parameters.presence_penalty + parameters.frequency_penalty * times


def _logit_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    for row, parameters in zip(logits, rows, strict=True):
        ids, biases = zip(*parameters.logit_bias, strict=True)
        index = tensor_on(logits.device, ids)
        row.index_add_(0, index, tensor_on(logits.device, biases, logits.dtype))


def _banned(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    for row, parameters in zip(logits, rows, strict=True):
        row[tensor_on(logits.device, sorted(parameters.banned_token_ids))] = float("-inf")


def _no_repeat_ngram(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """No n-gram of prompt and output occurs twice (Paulus et al. 2017)."""
    for row, parameters in zip(logits, rows, strict=True):
        tokens = [*parameters.prompt_token_ids, *parameters.output_token_ids]
        _exclude(row, ends_of_ngrams(tokens, parameters.no_repeat_ngram_size))


def _bad_words(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    for row, parameters in zip(logits, rows, strict=True):
        tokens = [*parameters.prompt_token_ids, *parameters.output_token_ids]
        _exclude(row, ends_of_bad_words(tokens, parameters.bad_words))


def _allowed(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """A stop token may follow too: anywhere for allowed tokens, after a whole word for allowed words."""
    for row, parameters in zip(logits, rows, strict=True):
        stops = parameters.stop_token_ids
        if parameters.allowed_token_ids:
            _exclude_others(row, {*parameters.allowed_token_ids, *stops})
        if parameters.allowed_words:
            found, whole = allowed_next(parameters.output_token_ids, parameters.allowed_words)
            _exclude_others(row, {*found, *stops} if whole else found)


def _grammar(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    allowed = np.stack([row.mask for row in rows if row.mask is not None])
    known = min(8 * allowed.shape[1], logits.shape[1])
    # What a byte of bits adds is read from a table: to fill by a mask of bools costs many times as much.
    bits = on_device(torch.from_numpy(allowed), logits.device)
    added = F.embedding(bits.int(), _added_by_bits().to(logits.device)).flatten(1)
    logits[:, :known] += added[:, :known]
    logits[:, known:] = float("-inf")


@functools.lru_cache(maxsize=1)
def _added_by_bits() -> Tensor:
    """float32 [256, 8]: 0 for each bit of a byte that is set, else -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill(bits == 0, float("-inf"))


def _exclude(row: Tensor, token_ids: set[int]) -> None:
    if token_ids:
        row[tensor_on(row.device, sorted(token_ids))] = float("-inf")


def _exclude_others(row: Tensor, token_ids: set[int]) -> None:
    index = tensor_on(row.device, sorted(token_ids), torch.int64)
    kept = row[index]
    row.fill_(float("-inf"))
    row[index] = kept


def _temperature(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    # Relative to the best, so that a tiny temperature overflows to -inf and never to NaN.
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= _column(logits, [max(row.temperature, 1e-30) for row in rows])


def _top_k(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """The k most probable, and those that equal the last of them."""
    sizes = [min(row.top_k, logits.shape[1]) for row in rows]
    best = logits.topk(max(sizes), dim=-1).values
    last = best.gather(1, tensor_on(logits.device, sizes)[:, None] - 1)
    logits.masked_fill_(logits < last, float("-inf"))


def _top_p(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """The smallest set of most probable tokens whose probability reaches top_p (Holtzman et al. 2020)."""
    wanted = [row.top_p for row in rows]
    if logits.shape[1] <= CANDIDATES:
        logits.masked_fill_(logits < _top_p_threshold(logits, logits, wanted)[0], float("-inf"))
        return
    candidates = logits.topk(CANDIDATES, dim=-1).values
    threshold, reached = _top_p_threshold(logits, candidates, wanted)
    for i in (~reached).nonzero().flatten().tolist():
        row = logits[i : i + 1]
        threshold[i] = _top_p_threshold(row, row, wanted[i : i + 1])[0]
    logits.masked_fill_(logits < threshold, float("-inf"))


def _top_p_threshold(logits: Tensor, candidates: Tensor, top_p: list[float]) -> tuple[Tensor, Tensor]:
    """The smallest logit kept [R, 1], and whether the candidates reached top_p [R]."""
    ordered = candidates.sort(dim=-1, descending=True).values.double()
    total = logits.double().logsumexp(dim=-1, keepdim=True)
    reached = (ordered - total).exp().cumsum(dim=-1)
    # A token is kept while those before it have not reached top_p; the first one always is.
    kept = (reached < _column(reached, top_p)).sum(dim=-1, keepdim=True)
    inside = kept[:, 0] < ordered.shape[1]
    last = kept.clamp_max(ordered.shape[1] - 1)
    return ordered.gather(1, last).to(logits.dtype), inside


def _min_p(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Drops what is less probable than min_p times the most probable (Nguyen et al. 2024)."""
    best = logits.amax(dim=-1, keepdim=True)
    logits.masked_fill_(logits < best + _column(logits, [row.min_p for row in rows]).log(), float("-inf"))


def _typical_p(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """The tokens whose surprise is nearest to the expected one, up to a mass (Meister et al. 2022)."""
    logprobs = logits.double().log_softmax(dim=-1)
    weights = logprobs.exp()
    entropy = -(logprobs * weights).nansum(dim=-1, keepdim=True)
    ordered, order = (-logprobs - entropy).abs().sort(dim=-1)
    reached = weights.gather(-1, order).cumsum(dim=-1)
    last = (reached < _column(reached, [row.typical_p for row in rows])).sum(dim=-1, keepdim=True)
    threshold = ordered.gather(-1, last.clamp_max(logits.shape[1] - 1))
    logits.masked_fill_((-logprobs - entropy).abs() > threshold, float("-inf"))


def _column(like: Tensor, values: list[float]) -> Tensor:
    return tensor_on(like.device, values, like.dtype)[:, None]


def _samples(row: SamplingRow) -> bool:
    return row.temperature > 0


STEPS = (
    Step(
        "penalties",
        lambda row: row.repetition_penalty != 1.0 or bool(row.presence_penalty or row.frequency_penalty),
        _penalties,
    ),
    Step("logit_bias", lambda row: bool(row.logit_bias), _logit_bias),
    Step("banned", lambda row: bool(row.banned_token_ids), _banned),
    Step("no_repeat_ngram", lambda row: row.no_repeat_ngram_size > 0, _no_repeat_ngram),
    Step("bad_words", lambda row: bool(row.bad_words), _bad_words),
    Step("allowed", lambda row: bool(row.allowed_words or row.allowed_token_ids), _allowed),
    Step("grammar", lambda row: row.mask is not None, _grammar),
    Step("temperature", _samples, _temperature),
    Step("top_k", lambda row: _samples(row) and row.top_k > 0, _top_k),
    Step("top_p", lambda row: _samples(row) and row.top_p < 1.0, _top_p),
    Step("min_p", lambda row: _samples(row) and row.min_p > 0.0, _min_p),
    Step("typical_p", lambda row: _samples(row) and row.typical_p < 1.0, _typical_p),
)
