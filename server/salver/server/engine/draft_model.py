"""A small model that guesses what the large one will say: its own weights, its own cache.

It only proposes (see `drafts`), so it may be behind, out of blocks or wrong at no other cost than speed.
"""

from __future__ import annotations

from collections.abc import Sequence as Values

import torch

from salver.model.sampling import INVALID, sample
from salver.server.engine.batch import Part, build_batch
from salver.server.engine.blocks import BlockPool
from salver.server.engine.drafts import Offer, StepCosts
from salver.server.engine.runner import ModelRunner, sampling_rows
from salver.server.engine.sequence import Sequence


class _Cached:
    """What the draft model has computed of one sequence, in which blocks."""

    __slots__ = ("block_table", "guesses", "num_tokens")

    def __init__(self) -> None:
        self.block_table: list[int] = []
        self.num_tokens = 0  # of the sequence's tokens, the first
        self.guesses: list[int] = []  # and behind them; the sequence may have gone another way


class DraftModel:
    """Proposes what a second checkpoint would choose, for all sequences of a step together.

    It chooses as the request says, with the noise of the position that it guesses at, so that sampled
    tokens are often guessed too. A prompt that it does not know yet is computed in chunks of
    `max_tokens` a step, over all sequences; until then its sequence gets no drafts.
    """

    def __init__(self, runner: ModelRunner, costs: StepCosts, *, max_tokens: int) -> None:
        """`costs` are those of the runner's steps."""
        self._runner = runner
        self._costs = costs
        self._max_tokens = max_tokens
        cache = runner.cache
        self._pool = BlockPool(cache.num_blocks, cache.block_size, enable_prefix_caching=False)
        self._cached: dict[Sequence, _Cached] = {}

    def offer(self, sequence: Sequence, most: int) -> Offer:
        # Its newest draft is never fed, so it needs no room.
        room = self._runner.model.spec.max_position_embeddings - sequence.num_tokens + 1
        return Offer(max(0, min(most, room)))

    def seconds(self, num_sequences: int) -> float:
        return self._costs.seconds(num_sequences)

    def forget(self, sequence: Sequence) -> None:
        cached = self._cached.pop(sequence, None)
        if cached is not None:
            self._pool.free(cached.block_table)

    @torch.inference_mode()
    def propose(self, wanted: Values[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence, _ in wanted}
        asking = list(wanted)
        while asking:
            ready, parts = self._next_step(asking, drafts)
            if not ready:
                break
            rows = [sampling_rows(sequence, tuple(drafts[sequence]))[-1] for sequence, _ in ready]
            chosen = sample(self._logits(parts, len(ready)), rows)
            for (sequence, _), token_id in zip(ready, chosen, strict=True):
                if token_id != INVALID:
                    drafts[sequence].append(token_id)
            asking = [
                (sequence, count)
                for (sequence, count), token_id in zip(ready, chosen, strict=True)
                if token_id != INVALID and len(drafts[sequence]) < count
            ]
        return [tuple(drafts[sequence]) for sequence, _ in wanted]

    @property
    def num_used_blocks(self) -> int:
        """Blocks of its own cache that hold something of an unfinished sequence."""
        return self._pool.num_used

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every block is free or owned by one sequence."""
        self._pool.check_integrity(cached.block_table for cached in self._cached.values())

    def _next_step(
        self, asking: list[tuple[Sequence, int]], drafts: dict[Sequence, list[int]]
    ) -> tuple[list[tuple[Sequence, int]], list[Part]]:
        """Who will have a next token after the step, and the step: theirs first, then unfinished prompts.

        Computes nothing when nobody will: then the step is run here for the prompts alone.
        """
        ready: list[tuple[Sequence, int]] = []
        whole: list[Part] = []
        chunks: list[Part] = []
        budget = self._max_tokens
        for sequence, count in asking:
            part = self._part(sequence, drafts[sequence], budget)
            if part is None:
                continue
            budget -= len(part.token_ids)
            if part.end == sequence.num_tokens + len(drafts[sequence]):
                ready.append((sequence, count))
                whole.append(part)
            else:
                chunks.append(part)
        if chunks and not ready:
            self._logits(chunks, 0)
        return ready, whole + chunks

    def _part(self, sequence: Sequence, draft: list[int], budget: int) -> Part | None:
        """The next tokens that the cache lacks, their blocks allocated; None for want of blocks or budget."""
        cached = self._cached.get(sequence)
        if cached is None:
            cached = self._cached[sequence] = _Cached()
        begin = cached.num_tokens
        behind = [*sequence.token_ids[begin:], *draft]
        right = 0
        for token_id, guess in zip(behind, cached.guesses, strict=False):
            if token_id != guess:
                break
            right += 1
        token_ids = behind[right : right + budget]
        part = Part(token_ids, begin + right, cached.block_table, sequence.num_prompt_tokens)
        missing = max(0, self._pool.blocks_for(part.end) - len(cached.block_table))
        if not token_ids or missing > self._pool.num_free:
            return None
        cached.block_table += self._pool.allocate(missing)
        cached.num_tokens = min(part.end, sequence.num_tokens)
        cached.guesses = behind[cached.num_tokens - begin : part.end - begin]
        return part

    def _logits(self, parts: list[Part], num_wanted: int) -> torch.Tensor:
        """float32 [num_wanted, vocab] after the last tokens of the first parts."""
        runner = self._runner
        batch = build_batch(parts, runner.block_size, row_multiple=runner.row_multiple, device=runner.device)
        hidden = runner.model(batch.token_ids, batch.positions, runner.cache, batch.attention)
        ends = batch.attention.cu_seqlens_q[1 : num_wanted + 1]
        return runner.logits(hidden, [end - 1 for end in ends])
