"""Beam search: which continuations of a request's beams live on, and which answers are kept.

Standard library only; nothing here knows of blocks or steps. The rules are those of transformers'
`generate(num_beams=k, do_sample=False)` (release 5, `_beam_search`):

- A continuation's score is the sum of its tokens' log-probabilities, as they are after all processing.
- Of all continuations of all beams the best k count. Those of them that end are answers, at their score
  divided by (number of tokens)^length_penalty; the best k answers are kept. The best k continuations
  that do not end are the next beams.
- The search ends at max_tokens, where all of the best k are answers; or, once there are k answers, as
  `early_stopping` says: at once (True), when the best beam at its present length is not better than the
  worst answer (False), or the same with the length that is best for it ("never").

A departure: where what a request excludes leaves fewer than k continuations, there are fewer beams, and
none of the unlikely doubles by which transformers fills their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salver.server.engine.request import BeamParams, FinishReason, Logprobs, StoppingParams


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may follow a beam. `told` is of the raw logits, where the request wants to know it."""

    token_id: int
    logprob: float
    told: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Beam:
    """An output that goes on, and its score."""

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An output that has ended, and its score with the length penalty."""

    token_ids: tuple[int, ...]
    score: float
    reason: FinishReason
    logprobs: tuple[Logprobs, ...] = ()


class BeamSearch:
    """The beams of one request, best first, and its best answers so far, best first."""

    def __init__(self, params: BeamParams, stopping: StoppingParams, num_forced: int = 0) -> None:
        """`num_forced`: tokens before the output that transformers counts into it (`forced_bos_token_id`)."""
        self.params = params
        self._num_forced = num_forced
        self.beams = [Beam()]
        self.answers: list[Answer] = []
        self.ended = False
        self._stopping = stopping
        self._length = 0  # tokens of each beam

    def advance(self, candidates: Sequence[Sequence[Candidate]]) -> list[tuple[int, int]]:
        """Takes what may follow each beam, in their order; for each of the next beams, (its parent, token).

        Each beam needs its most probable `num_candidates` tokens, or all that may follow.
        """
        most = self.params.num_beams
        self._length += 1
        at_end = self._length >= self._stopping.max_tokens
        penalty = self._penalty(self._length)
        forced = at_end and self._stopping.forced_eos_token_id is not None
        # Among equals: the better beam, then the lower id.
        ordered = sorted(
            (-(beam.score + candidate.logprob), parent, candidate.token_id, candidate)
            for parent, (beam, offered) in enumerate(zip(self.beams, candidates, strict=True))
            for candidate in offered
        )
        children: list[tuple[int, int]] = []
        beams: list[Beam] = []
        for place, (cost, parent, token_id, candidate) in enumerate(ordered):
            if place >= most and len(beams) == most:
                break
            stops = token_id in self._stopping.stop_token_ids
            ends = stops or at_end
            if place >= most if ends else len(beams) == most:
                continue
            before = self.beams[parent]
            token_ids = (*before.token_ids, token_id)
            logprobs = before.logprobs if candidate.told is None else (*before.logprobs, candidate.told)
            if ends:
                reason = FinishReason.STOP if stops and not forced else FinishReason.LENGTH
                self.answers.append(Answer(token_ids, -cost / penalty, reason, logprobs))
            else:
                children.append((parent, token_id))
                beams.append(Beam(token_ids, -cost, logprobs))
        self.answers.sort(key=lambda answer: -answer.score)  # the earlier of equals stays before the later
        del self.answers[most:]
        self.beams = beams
        self.ended = not beams or self._is_enough()
        return children

    def _is_enough(self) -> bool:
        """Whether the answers are those that are given, although beams go on."""
        params = self.params
        if len(self.answers) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        length = self._length
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._stopping.max_tokens
        return self.beams[0].score / self._penalty(length) <= self.answers[-1].score

    def _penalty(self, length: int) -> float:
        found: float = (length + self._num_forced) ** self.params.length_penalty
        return found


def num_candidates(params: BeamParams, stopping: StoppingParams) -> int:
    """So many most probable tokens of a beam hold all that can matter: the best k, and k that don't end."""
    return params.num_beams + len(stopping.stop_token_ids)


def beam_capacity(num_prompt_tokens: int, num_beams: int, num_blocks: int, block_size: int) -> int:
    """The longest prompt and output together for which so many blocks hold all beams.

    The beams share the prompt's blocks, but for the last, and nothing else for sure.
    """
    shared = (num_prompt_tokens - 1) // block_size
    return max(0, shared + (num_blocks - shared) // num_beams) * block_size
