"""One sample of a request inside the engine: its tokens, its blocks, how far it is computed."""

from __future__ import annotations

import enum

from salver.server.engine.accounting import Account
from salver.server.engine.blocks import block_digest, root_digest
from salver.server.engine.request import (
    AttentionOf,
    EngineRequest,
    FinishReason,
    SequenceTimings,
)

# (priority class, deadline, arrival, request, sample): lower is sooner.
OrderKey = tuple[int, float, float, int, int]


def order_key(request: EngineRequest, sample_index: int, priority_interval: float) -> OrderKey:
    """The place of a sample in the order; see `scheduler` for the rule."""
    interval = int(request.arrival // priority_interval)
    order = (interval - request.priority, request.deadline, request.arrival)
    return (*order, request.request_id, sample_index)


PENDING = -2  # stands for a token that the device has chosen and that is not read yet; see `overlap`


class SequenceStatus(enum.Enum):
    """Where a sequence is. A held one waits for its leader's prompt, which it will share."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The engine's state of one sample.

    `token_ids` is prompt and output together; the first `num_computed_tokens` of them have
    their keys and values in the blocks of `block_table`. Everything that is not yet
    computed is work, whatever it is called elsewhere (prefill, decode, recomputation).
    """

    __slots__ = (
        "_digests",
        "account",
        "arrival",
        "block_table",
        "cross_table",
        "finish_reason",
        "first_scheduled",
        "first_token",
        "followers",
        "grammar_state",
        "key",
        "last_token",
        "next_prompt_logprob",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "partial",
        "position_length",
        "positions",
        "preemptions",
        "request",
        "sample_index",
        "shares_prefix",
        "source_read",
        "status",
        "steps",
        "token_ids",
    )

    def __init__(
        self,
        request: EngineRequest,
        sample_index: int,
        output: tuple[int, ...],
        key: OrderKey,
        positions: str = "",
    ):
        """`positions` names how its positions are made, where that depends on its prompt's length."""
        self.request = request
        self.sample_index = sample_index
        self.key = key
        self.positions = positions
        self.token_ids = [*request.prompt_token_ids, *output]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.position_length = self.num_prompt_tokens  # the length that its positions are made for
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_table: list[int] = []
        self.num_registered_blocks = 0
        self.cross_table: list[int] = []  # blocks of its source; see `cross_cache`
        self.source_read = False
        self.partial: object = None  # what the runner has read of the computed tokens, for `encoding`
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.followers: list[Sequence] = []
        self.next_prompt_logprob = max(1, request.prompt_logprobs_start)
        self.arrival = request.arrival
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.steps = 0
        self.preemptions = 0
        self.shares_prefix = True  # unless several weights have computed it
        self.grammar_state: object | None = None  # the runner's; a function of the tokens
        self.account = Account(request.submitted, request.submitted) if request.explain else None
        self._digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generates(self) -> bool:
        """Whether it samples tokens, or only computes its prompt (Score)."""
        return self.request.stopping.max_tokens > 0

    @property
    def whole(self) -> bool:
        """Whether all its tokens are computed in one step, without a cache."""
        return self.request.encoding is not None and self.request.encoding.whole

    @property
    def reads_prefix_cache(self) -> bool:
        """A hit skips positions, so a prompt of which every position is still to be read takes none."""
        if self.request.encoding is not None or not self.shares_prefix:
            return False
        return self.request.prompt_top_k is None or self.next_prompt_logprob >= self.num_prompt_tokens

    @property
    def reads_source_cache(self) -> bool:
        """A source of which attention is to be read is read again."""
        encoding = self.request.encoding
        return encoding is None or encoding.attention_of is not AttentionOf.SOURCE

    @property
    def ending(self) -> bool:
        """Whether a token that is not read yet is its last one, whatever it is."""
        full = self.generates and self.num_output_tokens >= self.request.stopping.max_tokens
        return full and self.token_ids[-1] == PENDING

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def inherit_account(self, leader: Sequence) -> None:
        """What the leader's time went to until now is where its own went."""
        if self.account is not None and leader.account is not None:
            self.account.follow(leader.account)

    def outgrow(self) -> None:
        """From now on its positions are those of a prompt as long as it is."""
        self.position_length, self.positions = self.num_tokens, "long"
        self._digests.clear()

    @property
    def num_source_tokens(self) -> int:
        return len(self.request.source_token_ids)

    def source_digest(self) -> bytes:
        """Names the source, for those who may share what was computed of it."""
        root = root_digest(f"source\0{self.request.cache_salt}", self.request.adapter)
        return block_digest(root, self.request.source_token_ids)

    def follow(self, other: Sequence) -> None:
        """From now on it is another sequence that has come as far as `other`; blocks come apart."""
        self.token_ids = list(other.token_ids)
        self.position_length, self.positions = other.position_length, other.positions
        self.next_prompt_logprob = other.next_prompt_logprob
        self.num_cached_tokens = other.num_cached_tokens
        self.first_scheduled, self.first_token = other.first_scheduled, other.first_token
        self.last_token, self.steps, self.preemptions = other.last_token, other.steps, other.preemptions
        self._digests = list(other._digests)

    def _root_digest(self) -> bytes:
        if self.request.source_token_ids:  # every token depends on all of it
            return self.source_digest()
        salt = self.request.cache_salt
        return root_digest(f"{self.positions}\0{salt}" if self.positions else salt, self.request.adapter)

    def digests(self, block_size: int, num_tokens: int) -> list[bytes]:
        """The hash chain over the full blocks of the first `num_tokens` tokens."""
        count = num_tokens // block_size
        while len(self._digests) < count:
            start = len(self._digests) * block_size
            parent = self._digests[-1] if self._digests else self._root_digest()
            self._digests.append(block_digest(parent, self.token_ids[start : start + block_size]))
        return self._digests[:count]

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Whether the output ends with the token just appended."""
        stopping = self.request.stopping
        if token_id in stopping.stop_token_ids and not self.end_is_forced(self.num_output_tokens - 1):
            return FinishReason.STOP
        if self.num_output_tokens >= stopping.max_tokens:
            return FinishReason.LENGTH
        return None

    def end_is_forced(self, position: int) -> bool:
        """Whether the output token at this position is the last and set: it ended by its limit."""
        stopping = self.request.stopping
        return stopping.forced_eos_token_id is not None and position == stopping.max_tokens - 1

    def timings(self) -> SequenceTimings:
        """Seconds by phase, as far as it came."""
        timings = SequenceTimings(steps=self.steps, preemptions=self.preemptions)
        if self.first_scheduled is not None:
            timings.queue = self.first_scheduled - self.arrival
            if self.first_token is not None and self.last_token is not None:
                timings.prefill = self.first_token - self.first_scheduled
                timings.decode = self.last_token - self.first_token
        return timings
