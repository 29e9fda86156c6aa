"""What runs in the next step. No phases: every sequence is tokens that are not yet computed.

Standard library only. `schedule()` lets `num_computed_tokens` of each sequence catch up
with its `num_tokens` under one token budget: running sequences first, best first, each
sure of at least one token, then waiting ones. A prompt longer than the budget is taken
in chunks, a cached prefix is a head start, a preempted sequence starts again from its
tokens so far, and so does a resumed one: all the same case. An input that must be computed
whole (an encoder's) takes no blocks and is never cut: it waits for a step with room, and one
longer than that goes alone of its kind.

Order between tenants: see `waiting`. Order within a tenant: the class (arrival in whole priority
intervals, less the priority), then the earlier deadline, then arrival. The class of a waiting
request never changes while that of later arrivals grows, so whatever arrives, only requests of
priority p' that came less than (p' - p + 1) intervals later can overtake one of priority p:
nothing starves.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from salver.server.engine.accounting import Cause, WaitClocks
from salver.server.engine.beam_groups import BeamGroups
from salver.server.engine.blocks import BlockPool
from salver.server.engine.cross_cache import (
    cached_source,
    free_source,
    share_source,
    source_was_read,
    take_source,
)
from salver.server.engine.drafts import Speculation
from salver.server.engine.request import NO_DEADLINE, EngineRequest, FinishReason
from salver.server.engine.schedule import Schedule, Scheduled
from salver.server.engine.sequence import OrderKey, Sequence, SequenceStatus, order_key
from salver.server.engine.step_budget import StepBudget
from salver.server.engine.waiting import WaitingQueue


class Scheduler:
    """Queues, blocks and the choice of each step."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        tokens_for_one: int = 0,
        priority_interval: float = 1.0,
        speculation: Speculation | None = None,
        rope_context: tuple[int, str] = (0, ""),
    ) -> None:
        """`tokens_for_one` is as in `StepBudget`, `rope_context` as in `ModelSpec`.

        Raises ValueError for too small a budget.
        """
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}): every running sequence takes a token a step"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._step_budget = StepBudget(max_num_batched_tokens, tokens_for_one)
        self.priority_interval = priority_interval
        self.speculation = speculation
        self.rope_context = rope_context
        self.running: list[Sequence] = []  # sorted by key, best first
        self.num_waiting = 0
        self.preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # and found
        self.beams = BeamGroups(self)
        self._waiting = WaitingQueue()
        self._clocks = WaitClocks()
        self._deadlines: list[tuple[float, int, int, Sequence]] = []  # a heap, likewise
        self._sequences: dict[int, dict[int, Sequence]] = {}  # by request, sample; unfinished ones
        self.copies: list[tuple[int, int]] = []

    # --- what comes in -----------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queues a request: its first sample leads, the others share the leader's prompt."""
        positions = self._positions(len(request.prompt_token_ids))
        starts = list(zip(request.sample_indices, request.outputs, strict=True))
        if request.beams is not None:
            starts = [(0, ())]
        samples = [
            Sequence(request, index, output, self._key(request, index), positions) for index, output in starts
        ]
        if request.beams is not None:
            self.beams.add(samples[0], request.beams)
        for sequence in samples:
            if self.outgrew(sequence):
                sequence.outgrow()
        self._sequences[request.request_id] = {s.sample_index: s for s in samples}
        for sequence in samples:
            if request.deadline != NO_DEADLINE:
                entry = (request.deadline, request.request_id, sequence.sample_index, sequence)
                heapq.heappush(self._deadlines, entry)
        self._lead(samples)

    def find(self, request_id: int, sample_index: int | None = None) -> list[Sequence]:
        """The unfinished sequences of a request, or one of them; empty when it has ended."""
        samples = self._sequences.get(request_id, {})
        if sample_index is None:
            return list(samples.values())
        return [samples[sample_index]] if sample_index in samples else []

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in whatever state it is and frees what it holds, now."""
        if sequence.finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.num_waiting -= 1
        followers, sequence.followers = sequence.followers, []
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        self.release(sequence)
        samples = self._sequences[sequence.request.request_id]
        del samples[sequence.sample_index]
        if not samples:
            del self._sequences[sequence.request.request_id]
        # A leader that ends before its prompt is computed leaves the lead to the next sample.
        for follower in followers:
            follower.inherit_account(sequence)
        self._lead([f for f in followers if not f.finished])

    @property
    def now(self) -> float:
        """When the last step was chosen."""
        return self._clocks.now

    def add_beam(self, request: EngineRequest) -> Sequence:
        """One sequence more for a request in the engine."""
        samples = self._sequences[request.request_id]
        beam = Sequence(request, len(samples), (), self._key(request, len(samples)))
        beam.account = next(iter(samples.values())).account  # one for all of them
        samples[beam.sample_index] = beam
        return beam

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def unfinished(self) -> Iterator[Sequence]:
        for samples in self._sequences.values():
            yield from samples.values()

    # --- the step ----------------------------------------------------------------------

    def expired(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed; the caller finishes them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[-1]
            if not sequence.finished:
                expired.append(sequence)
        # Entries of ended requests with far deadlines would pile up: sweep when they are the most.
        if len(self._deadlines) > 64 + 2 * sum(len(s) for s in self._sequences.values()):
            self._deadlines = [entry for entry in self._deadlines if not entry[-1].finished]
            heapq.heapify(self._deadlines)
        return expired

    def schedule(self, now: float) -> Schedule:
        """Chooses the next step. Allocates its blocks, preempting from the worst end when short."""
        schedule = Schedule()
        self._clocks.advance(now)
        self._renew_positions()
        budget, preempted = self._schedule_running(schedule)
        cause = Cause.NO_BLOCKS if preempted else self._schedule_waiting(schedule, budget, now)
        self._clocks.hold(cause, self._waiting.passed_over())
        if self.speculation is not None:
            self._schedule_drafts(schedule, self.speculation)
        schedule.copies, self.copies = self.copies, []
        return schedule

    def advance(self, item: Scheduled, num_accepted: int = 0) -> None:
        """Records that a scheduled part is computed: full blocks become findable, samples fork.

        Of its drafts the first `num_accepted` are tokens of the sequence now. The others were never
        there: their slots are written again, and blocks taken for them alone go back.
        """
        sequence = item.sequence
        if item.reads_source:
            source_was_read(sequence, self.pool)
        sequence.num_computed_tokens = item.start + item.num_tokens - len(item.draft) + num_accepted
        size = self.pool.block_size
        if item.draft:
            needed = self.pool.blocks_for(sequence.num_tokens)
            self.pool.give_back(sequence.block_table[needed:])
            del sequence.block_table[needed:]
        full = min(sequence.num_computed_tokens // size, len(sequence.block_table))
        if full > sequence.num_registered_blocks and sequence.shares_prefix:
            digests = sequence.digests(size, full * size)
            for index in range(sequence.num_registered_blocks, full):
                self.pool.register(sequence.block_table[index], digests[index])
            sequence.num_registered_blocks = full
        if sequence.followers and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            self._fork_followers(sequence)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Output tokens that a sequence got, for fairness between tenants (see `waiting`)."""
        self._waiting.charge(sequence, num_tokens)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every block is free, cached or owned exactly once per owner."""
        self.pool.check_integrity(
            table for s in self.unfinished() for table in (s.block_table, s.cross_table)
        )

    # --- inside ------------------------------------------------------------------------

    def _positions(self, num_prompt_tokens: int) -> str:
        """Names how positions are made for a prompt so long: requests share blocks only under one name."""
        original, beyond = self.rope_context
        if num_prompt_tokens <= original or not original:
            return ""
        return str(num_prompt_tokens) if beyond == "each" else "long"

    def outgrew(self, sequence: Sequence) -> bool:
        """Whether it is longer now than its positions were made for, so that it is computed again."""
        return self._room_to_grow(sequence) < 0

    def _room_to_grow(self, sequence: Sequence) -> int:
        original, beyond = self.rope_context
        if beyond != "again" or sequence.positions:
            return sequence.request.stopping.max_tokens
        return original - sequence.num_tokens

    def _renew_positions(self) -> None:
        if self.rope_context[1] != "again":
            return
        for sequence in [s for s in self.running if self.outgrew(s)]:
            if sequence.status is SequenceStatus.RUNNING:  # it has not gone together with another beam
                sequence.outgrow()
                self.preempt(sequence)

    def _key(self, request: EngineRequest, sample_index: int) -> OrderKey:
        return order_key(request, sample_index, self.priority_interval)

    def _lead(self, samples: list[Sequence]) -> None:
        """Queues the first of these; the others are held until its prompt is computed."""
        if not samples:
            return
        leader, *followers = samples
        leader.followers = followers
        for follower in followers:
            follower.status = SequenceStatus.HELD
        self.wait(leader)

    def wait(self, sequence: Sequence) -> None:
        """Queues it at its place in the order."""
        sequence.status = SequenceStatus.WAITING
        self.num_waiting += 1
        self._waiting.push(sequence)
        self._clocks.enter(sequence)

    def release(self, sequence: Sequence) -> None:
        """Takes from a sequence all that it holds, but its tokens."""
        if self.speculation is not None:
            self.speculation.forget(sequence)
        self.pool.free(sequence.block_table)
        free_source(sequence, self.pool)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.partial = None

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue, at its old place; its tokens are computed again."""
        group = self.beams.of(sequence.request.request_id)
        if group is not None:
            self.beams.preempt(group)
            return
        self.running.remove(sequence)
        if sequence.account is not None:
            sequence.account.preempted(self._clocks.now, sequence.num_computed_tokens)
        self.release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.wait(sequence)

    def _budget(self) -> int:
        """Tokens of the next step; at least one for each running sequence."""
        seats = self.max_num_seqs - len(self.running)
        best = self._best_waiting() if seats > 0 else None
        waiting = 0 if best is None else min(self.num_waiting, seats)
        return self._step_budget.tokens(self.running, waiting, 0.0 if best is None else best.arrival)

    def _schedule_running(self, schedule: Schedule) -> tuple[int, bool]:
        budget = self._budget()
        preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            # Those behind keep a token each, or one long prompt would stall every stream.
            if sequence.ending:
                index += 1
                continue
            behind = len(self.running) - index - 1
            start = sequence.num_computed_tokens
            num_tokens = min(sequence.num_tokens - start, budget - behind)
            missing = self.pool.blocks_for(start + num_tokens) - len(sequence.block_table)
            # All beams of a request find room, or none: those behind it are preempted together.
            beams = sequence.request.beams is not None
            if (self.beams.missing(sequence) if beams else missing) > self.pool.num_free:
                # The worst has not been scheduled yet: at the end stands this one or a worse one.
                self.preempt(self.running[-1])
                preempted = True
                continue
            sequence.block_table += self.pool.allocate(max(0, missing))
            index += 1
            if num_tokens:  # a beam may wait for the others, which are being computed again
                schedule.scheduled.append(Scheduled(sequence, start, num_tokens))
                budget -= num_tokens
        return budget, preempted

    def _schedule_waiting(self, schedule: Schedule, budget: int, now: float) -> Cause:
        """Takes from the queue what has room; why it takes no more."""
        while budget > 0 and (places := self._free_places()) > 0:
            sequence = self._best_waiting()
            if sequence is None or not self._has_room(sequence, schedule, budget):
                return Cause.NO_TOKENS
            if sequence.request.beams is not None and sequence.request.num_places > places:
                return Cause.NO_SEAT
            if not self._admit(sequence):
                return Cause.NO_BLOCKS
            self._waiting.pop(sequence)
            self._clocks.leave(sequence)
            self.num_waiting -= 1
            sequence.status = SequenceStatus.RUNNING
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                schedule.started.append(sequence)
                # Once: what a preemption makes it compute again was not the tenant's wish.
                unread = 0 if sequence.source_read else sequence.num_source_tokens
                new = sequence.num_tokens - sequence.num_computed_tokens + unread
                self._waiting.charge(sequence, new)
            insort(self.running, sequence, key=lambda s: s.key)
            start = sequence.num_computed_tokens
            item = Scheduled(sequence, start, sequence.num_tokens - start)
            item.reads_source = bool(sequence.cross_table) and not sequence.source_read
            budget -= item.num_source_tokens
            if not sequence.whole:
                item.num_tokens = min(item.num_tokens, max(1, budget))
            schedule.scheduled.append(item)
            budget -= item.num_tokens
        return Cause.NO_SEAT if self._free_places() <= 0 else Cause.NO_TOKENS

    @staticmethod
    def _has_room(sequence: Sequence, schedule: Schedule, budget: int) -> bool:
        """Whether this step takes the sequence: of whole ones and sources, those that fit, always a first."""
        uncut = sequence.num_tokens if sequence.whole else sequence.num_source_tokens
        if uncut <= budget:
            return True
        return not any(item.sequence.whole or item.reads_source for item in schedule.scheduled)

    def _schedule_drafts(self, schedule: Schedule, speculation: Speculation) -> None:
        """Adds drafts to what samples in this step, out of the budget and the blocks that nobody wants."""
        items = [i for i in schedule.scheduled if i.samples and i.sequence.request.beams is None]
        num_rows = schedule.num_tokens
        budget = self.max_num_batched_tokens - num_rows
        if not items or budget <= 0:
            return
        # A step gives one token more than its accepted drafts.
        rooms = [
            (s, min(s.request.stopping.max_tokens - s.num_output_tokens - 1, self._room_to_grow(s)))
            for s in (i.sequence for i in items)
        ]
        for item, draft in zip(items, speculation.drafts(rooms, num_rows, budget), strict=True):
            table = item.sequence.block_table
            end = item.start + item.num_tokens
            missing = self.pool.blocks_for(end + len(draft)) - len(table)
            table += self.pool.allocate(max(0, min(missing, self.pool.num_free)))
            item.draft = draft[: len(table) * self.pool.block_size - end]
            item.num_tokens += len(item.draft)

    def _free_places(self) -> int:
        return self.max_num_seqs - len(self.running) - self.beams.reserved

    def _best_waiting(self) -> Sequence | None:
        return self._waiting.best()

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a sequence the blocks of all its tokens, cached ones first, or leaves it waiting.

        All its blocks at once, so that a chunked prompt never stops half way for want of
        blocks; and while others run, one block is left for each of them to grow into.
        """
        if sequence.whole:
            return True
        hits: list[int] = []
        if sequence.reads_prefix_cache:
            # A full hit still computes the last token: its logits are what is wanted.
            hits = self.pool.lookup(sequence.digests(self.pool.block_size, sequence.num_tokens - 1))
        missing = self.pool.blocks_for(sequence.num_tokens) - len(hits)
        source = cached_source(sequence, self.pool) if sequence.num_source_tokens else []
        unread = 0 if source else self.pool.blocks_for(sequence.num_source_tokens)
        left = self.pool.num_free - self.pool.num_free_among(hits + source) - missing - unread
        beams = sequence.request.beams is not None
        if beams:
            left -= self.beams.blocks_beside(sequence)
        if left < len(self.running) + self.beams.reserved:
            return False
        self.pool.share(hits)
        if sequence.num_source_tokens:
            take_source(sequence, self.pool, source)
        sequence.block_table = hits + self.pool.allocate(missing)
        if beams:
            self.beams.admit(sequence)
        sequence.num_computed_tokens = len(hits) * self.pool.block_size
        sequence.num_registered_blocks = len(hits)
        if sequence.first_scheduled is None and (sequence.reads_prefix_cache or sequence.num_source_tokens):
            cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            looked_up = sequence.num_prompt_tokens
            if sequence.num_source_tokens:  # what an output begins with is too short to be found
                cached, looked_up = (sequence.num_source_tokens if source else 0), sequence.num_source_tokens
            sequence.num_cached_tokens = cached
            self.prefix_queries += looked_up
            self.prefix_hits += cached
        return True

    def _fork_followers(self, leader: Sequence) -> None:
        """Lets held samples share the leader's prompt: full blocks owned together, the last one copied.

        A fork leaves the last prompt token to compute, which gives the sample its own
        first logits. A sample that finds no slot or block waits like any other request.
        """
        if leader.request.beams is not None:
            self.beams.release_followers(leader)
            return
        size = self.pool.block_size
        shared_tokens = leader.num_prompt_tokens - 1
        shared = leader.block_table[: shared_tokens // size]
        has_part = shared_tokens % size > 0
        followers, leader.followers = leader.followers, []
        for follower in followers:
            if follower.finished:
                continue
            follower.inherit_account(leader)
            follower.next_prompt_logprob = leader.num_prompt_tokens  # the leader has told them
            missing = self.pool.blocks_for(follower.num_tokens) - len(shared)
            if self._free_places() <= 0 or self.pool.num_free - missing < len(self.running):
                self.wait(follower)
                continue
            self.pool.share(shared)
            fresh = self.pool.allocate(missing)
            if has_part:
                self.copies.append((leader.block_table[len(shared)], fresh[0]))
            follower.block_table = shared + fresh
            share_source(leader, follower, self.pool)
            follower.num_computed_tokens = shared_tokens
            follower.num_registered_blocks = len(shared)
            follower.num_cached_tokens = leader.num_cached_tokens
            follower.first_scheduled = leader.first_scheduled
            follower.status = SequenceStatus.RUNNING
            insort(self.running, follower, key=lambda s: s.key)
