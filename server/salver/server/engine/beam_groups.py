"""The beams of requests among the other sequences: places, blocks, forks. Standard library only.

A beam is a sequence like any, so steps, chunks and the prefix cache don't know it from one. What
differs is here: all beams of a request come and go together, what follows them is chosen when all
have been computed, and a beam with several children is forked. Of its children the first goes on in
its own blocks, each other one owns the full blocks together with it and has a copy of the last.

A request starts as one sequence, its leader, and holds places for all its beams from then on. One that
was preempted starts so again: the other beams own the prompt's full blocks together with the leader,
and wait until it has computed them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Values
from typing import TYPE_CHECKING

from salver.server.engine.beam import Answer, BeamSearch, Candidate
from salver.server.engine.cross_cache import share_source
from salver.server.engine.request import BeamParams, FinishReason, SequenceOutput
from salver.server.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from salver.server.engine.scheduler import Scheduler


class BeamGroup:
    """The beams of one request."""

    __slots__ = ("candidates", "live", "request", "sample_indices", "search", "spare", "told")

    def __init__(self, leader: Sequence, params: BeamParams) -> None:
        self.request = leader.request
        request = leader.request
        self.search = BeamSearch(params, request.stopping, max(0, request.num_start_tokens - 1))
        self.live = [leader]  # the sequence of each of the search's beams
        self.spare: list[Sequence] = []  # hold nothing, for beams to come
        self.candidates: dict[Sequence, list[Candidate]] = {}  # of the beams that are computed already
        self.sample_indices = list(leader.request.sample_indices)  # the answers that are still wanted
        self.told = False  # that it is being computed

    @property
    def complete(self) -> bool:
        """Whether all beams are computed, so that what follows them can be chosen."""
        return len(self.candidates) == len(self.live)

    def give_up(self, sample_index: int | None) -> bool:
        """One answer is not wanted any more, or none is; whether any still is."""
        self.sample_indices = [i for i in self.sample_indices if sample_index not in (None, i)]
        return bool(self.sample_indices)

    def outputs(self) -> list[SequenceOutput]:
        """The answers that are wanted. Where the request's parameters leave fewer, ABORT and nothing."""
        answers = self.search.answers
        return [
            self._output(index, answers[index] if index < len(answers) else None)
            for index in self.sample_indices
        ]

    def failures(self, reason: FinishReason, error: str) -> list[SequenceOutput]:
        """The same of a request that ends otherwise."""
        outputs = [self._output(index, None) for index in self.sample_indices]
        for output in outputs:
            output.finish_reason, output.error = reason, error
        return outputs

    def _output(self, index: int, answer: Answer | None) -> SequenceOutput:
        timings = self.live[0].timings()
        account = self.live[0].account
        if index != self.sample_indices[0]:
            timings.preemptions, account = 0, None  # they are counted once
        output = SequenceOutput(
            self.request.request_id, index, finish_reason=FinishReason.ABORT,
            num_cached_tokens=self.live[0].num_cached_tokens, timings=timings, account=account,
        )  # fmt: skip
        if answer is not None:
            output.token_ids, output.finish_reason = list(answer.token_ids), answer.reason
            output.score = answer.score
            if self.request.output_top_k is not None:
                output.logprobs = list(answer.logprobs)
        return output

    def advance(self) -> list[tuple[int, int]]:
        """For each of the next beams its parent and its token; the search may have ended."""
        candidates, self.candidates = self.candidates, {}
        return self.search.advance([candidates[sequence] for sequence in self.live])


class BeamGroups:
    """All beam requests of a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._groups: dict[int, BeamGroup] = {}
        self._running: dict[int, BeamGroup] = {}  # of these, those that have places and blocks

    def add(self, sequence: Sequence, params: BeamParams) -> None:
        self._groups[sequence.request.request_id] = BeamGroup(sequence, params)

    def of(self, request_id: int) -> BeamGroup | None:
        return self._groups.get(request_id)

    @property
    def reserved(self) -> int:
        """Places of the batch that nobody has now but beams to come."""
        return sum(
            group.request.num_places - running
            for group in self._running.values()
            if (running := sum(s.status is SequenceStatus.RUNNING for s in group.live))
        )

    def complete(self) -> list[BeamGroup]:
        """Those whose next tokens can be chosen, in the scheduler's order."""
        groups = [group for group in self._running.values() if group.complete]
        return sorted(groups, key=lambda group: group.live[0].key)

    def take(self, sequence: Sequence, candidates: list[Candidate]) -> None:
        """What may follow a beam."""
        self._groups[sequence.request.request_id].candidates[sequence] = candidates

    # --- blocks ------------------------------------------------------------------------

    def missing(self, sequence: Sequence) -> int:
        """Blocks that the beams of its request need to go on."""
        blocks_for = self._scheduler.pool.blocks_for
        return sum(
            max(0, blocks_for(beam.num_tokens) - len(beam.block_table))
            for beam in self._groups[sequence.request.request_id].live
            if beam.status is SequenceStatus.RUNNING
        )

    def blocks_beside(self, leader: Sequence) -> int:
        """Blocks that the other beams of a waiting leader take when it is admitted."""
        shared = self._shared_blocks(leader)
        return sum(self._scheduler.pool.blocks_for(f.num_tokens) - shared for f in leader.followers)

    def admit(self, leader: Sequence) -> None:
        """Gives the other beams all their blocks; they are held until the leader's prompt is computed."""
        request_id = leader.request.request_id
        self._running[request_id] = self._groups[request_id]
        pool, shared = self._scheduler.pool, self._shared_blocks(leader)
        for follower in leader.followers:
            pool.share(leader.block_table[:shared])
            fresh = pool.allocate(pool.blocks_for(follower.num_tokens) - shared)
            follower.block_table = leader.block_table[:shared] + fresh
            share_source(leader, follower, pool)

    def release_followers(self, leader: Sequence) -> None:
        """The leader's prompt is computed: the other beams go on behind its full blocks."""
        shared = self._shared_blocks(leader)
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.num_registered_blocks = shared
            follower.source_read = leader.source_read
            follower.num_computed_tokens = shared * self._scheduler.pool.block_size
            follower.next_prompt_logprob = leader.num_prompt_tokens  # the leader has told them
            self._run(follower)

    def _make_room(self, num_blocks: int, group: BeamGroup) -> bool:
        """Preempts from the worst end until so many blocks are free; False where that end is this group."""
        scheduler = self._scheduler
        while num_blocks > scheduler.pool.num_free:
            if scheduler.running[-1].request is group.request:
                return False
            scheduler.preempt(scheduler.running[-1])
        return True

    def _fork_blocks(self, parent: Sequence) -> list[int]:
        """The table of a further child: the full blocks, and a copy of the last before the next step."""
        pool = self._scheduler.pool
        full, part = divmod(parent.num_computed_tokens, pool.block_size)
        table = parent.block_table[:full]
        pool.share(table)
        if part:
            copy = pool.allocate(1)
            self._scheduler.copies.append((parent.block_table[full], copy[0]))
            table += copy
        return table

    def _shared_blocks(self, leader: Sequence) -> int:
        return (leader.num_prompt_tokens - 1) // self._scheduler.pool.block_size

    # --- coming and going --------------------------------------------------------------

    def go_on(self, group: BeamGroup, children: Values[tuple[int, int]]) -> None:
        """Makes the group's sequences those of the next beams: (place of the parent, token), best first.

        Where blocks are short, the worst sequences are preempted, and this request if it is the worst.
        """
        parents, scheduler = group.live, self._scheduler
        fertile = {parent for parent, _ in children}
        for place, sequence in enumerate(parents):
            if place not in fertile:
                self._stop(sequence)
                group.spare.append(sequence)
        computed = parents[0].num_tokens  # of every beam
        copies = len(children) - len(fertile) if computed % scheduler.pool.block_size else 0
        has_room = self._make_room(copies, group)
        group.live = []
        seen: set[int] = set()
        for place, _ in children:
            parent = parents[place]
            if place not in seen:
                seen.add(place)
                group.live.append(parent)
                continue
            beam = self._spare(group)
            beam.follow(parent)
            group.live.append(beam)
            if has_room:
                beam.block_table = self._fork_blocks(parent)
                share_source(parent, beam, scheduler.pool)
                beam.num_registered_blocks = parent.num_registered_blocks
                beam.num_computed_tokens = computed
                self._run(beam)
        for beam, (_, token_id) in zip(group.live, children, strict=True):
            beam.token_ids.append(token_id)
        if not has_room:
            self.preempt(group)

    def preempt(self, group: BeamGroup) -> None:
        """All beams give back what they hold; their tokens stay, and the first waits for them all."""
        scheduler = self._scheduler
        del self._running[group.request.request_id]
        group.candidates.clear()
        leader, *others = sorted(group.live, key=lambda beam: beam.sample_index)
        if leader.account is not None:
            leader.account.preempted(scheduler.now, max(beam.num_computed_tokens for beam in group.live))
        for beam in group.live:
            self._stop(beam)
            beam.followers = []
            beam.preemptions += 1
            if scheduler.outgrew(beam):
                beam.outgrow()
        leader.followers = others
        scheduler.preemptions += 1
        scheduler.wait(leader)

    def finish(self, group: BeamGroup, reason: FinishReason) -> None:
        """Ends the request in whatever state it is and frees what it holds."""
        sequences = [*group.live, *group.spare]
        for sequence in sequences:
            sequence.followers = []  # nobody shall lead them
        for sequence in sequences:
            self._scheduler.finish(sequence, reason)
        del self._groups[group.request.request_id]
        self._running.pop(group.request.request_id, None)

    def _spare(self, group: BeamGroup) -> Sequence:
        return group.spare.pop() if group.spare else self._scheduler.add_beam(group.request)

    def _run(self, beam: Sequence) -> None:
        beam.status = SequenceStatus.RUNNING
        insort(self._scheduler.running, beam, key=lambda s: s.key)

    def _stop(self, beam: Sequence) -> None:
        """Takes a running (or held) beam out of the batch, without its blocks."""
        if beam.status is SequenceStatus.RUNNING:
            self._scheduler.running.remove(beam)
        beam.status = SequenceStatus.HELD
        self._scheduler.release(beam)
