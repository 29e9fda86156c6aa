"""Grammars that an output must follow: which tokens may come next, by llguidance.

A grammar's state is a function of the output's tokens, so that a sequence that was preempted,
resumed or checked with drafts has the state of one that ran through. Compiling and every mask
are bounded by the library's own fuel (`LIMITS`), whatever the grammar is; the front has tried
each one in a process of its own before (`salver.server.grammar_check`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Values
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from salver.model.errors import CheckpointError
from salver.model.tokenizer import Tokenizer
from salver.server.engine.sequence import Sequence

# [rows, bytes]: a bit for each token, the lowest of a byte first, set where it may follow.
Mask = npt.NDArray[np.uint8]

CACHED_GRAMMARS = 64
# A mask takes at most a few milliseconds, a compilation a few tens.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
)


class _Vocabulary:
    """Our tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids | set(tokenizer.eos_token_ids))
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


def load_vocabulary(checkpoint: Path) -> LLTokenizer:
    """The checkpoint's tokens, as the detokenizer spells them. Raises CheckpointError: also for tokens
    that no grammar can follow, because none ends a sequence or they have no bytes.
    """
    tokenizer = Tokenizer.from_directory(checkpoint)
    if not tokenizer.eos_token_ids or tokenizer.decoding is None:
        raise CheckpointError(f"{checkpoint}: its tokens cannot follow a grammar")
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=list(tokenizer.eos_token_ids),
    )


def compile_grammar(grammar: str, vocabulary: LLTokenizer) -> LLMatcher:
    """At the beginning of an output. An error is in the matcher (`is_error`)."""
    return LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)


class _State:
    """Where a sequence's output is in its grammar."""

    __slots__ = ("matcher", "num_consumed")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.num_consumed = 0


class Grammars:
    """The masks of the sequences that have a grammar."""

    def __init__(self, load: Callable[[], LLTokenizer], *, beside: bool = True) -> None:
        """`load` gives the vocabulary; it is called when that is first needed, or by `warm`.

        `beside`: masks are made while the model computes. That gains where the model is elsewhere: on
        processors that its threads share evenly, one that makes masks too keeps all the others waiting.
        """
        self._load = load
        self._beside = beside
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor = LLExecutor(1)  # more gain nothing for a few dozen masks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def warm(self) -> LLTokenizer:
        """Loads the vocabulary, once; from any thread."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def warm_beside(self) -> None:
        """Loads it in a thread, so that the first request with a grammar need not wait."""

        def work() -> None:
            with contextlib.suppress(CheckpointError):  # whoever needs it meets the error again
                self.warm()

        threading.Thread(target=work, daemon=True, name="vocabulary").start()

    def begin(self, wanted: Values[tuple[Sequence, tuple[int, ...]]]) -> Future[list[Mask | None]]:
        """`masks`, perhaps in a thread: while the model computes, and neither knows the other's outcome.

        Until it is done nobody may ask for more of these sequences, or add to their tokens.
        """
        if self._beside and any(sequence.request.grammar for sequence, _ in wanted):
            return self._thread.submit(self.masks, wanted)
        made: Future[list[Mask | None]] = Future()
        made.set_result(self.masks(wanted))
        return made

    def masks(self, wanted: Values[tuple[Sequence, tuple[int, ...]]]) -> list[Mask | None]:
        """For each sequence and its drafts the tokens that may follow, and after each draft.

        [1 + drafts, at least the vocabulary / 8] each; None without a grammar. Rows behind a draft that the
        grammar does not allow say nothing. No token may follow where the grammar was too much for its
        limits, or the tokens so far don't follow it.
        """
        found: list[Mask | None] = [None] * len(wanted)
        concerned = [i for i, (sequence, _) in enumerate(wanted) if sequence.request.grammar]
        if not concerned:
            return found
        width = -(-self.warm().vocab_size // 32)
        matchers, first_rows, rows = [], [], 0
        for i in concerned:
            matchers.append(self._matcher(wanted[i][0]))
            first_rows.append(rows)
            rows += 1 + len(wanted[i][1])
        masks = np.zeros((rows, width), dtype=np.int32)
        sound = [k for k, matcher in enumerate(matchers) if not matcher.is_error()]
        self._fill([(matchers[k], first_rows[k], wanted[concerned[k]][1]) for k in sound], masks)
        ends = [*first_rows[1:], rows]
        for matcher, first, end in zip(matchers, first_rows, ends, strict=True):
            if matcher.is_error():  # the library says then that the end may follow
                masks[first:end] = 0
        for i, first, end in zip(concerned, first_rows, ends, strict=True):
            found[i] = masks[first:end].view(np.uint8)
        return found

    def _fill(
        self, wanted: Values[tuple[LLMatcher, int, tuple[int, ...]]], masks: npt.NDArray[np.int32]
    ) -> None:
        """Of matchers, with their first rows and drafts. Leaves them where they are."""
        drafted = [(matcher, row, list(draft)) for matcher, row, draft in wanted if draft]
        plain = [(matcher, row) for matcher, row, draft in wanted if not draft]
        if plain:
            fill_next_token_bitmask_par(self._executor, plain, masks)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)

    def _matcher(self, sequence: Sequence) -> LLMatcher:
        """The sequence's own, moved on to its newest token."""
        state = sequence.grammar_state
        if not isinstance(state, _State):
            state = sequence.grammar_state = _State(self._start(sequence.request.grammar).deep_copy())
        new = sequence.token_ids[sequence.num_prompt_tokens + state.num_consumed :]
        if new:
            state.matcher.consume_tokens(new)
            state.num_consumed += len(new)
        return state.matcher

    def _start(self, grammar: str) -> LLMatcher:
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = compile_grammar(grammar, self.warm())
        self._compiled[grammar] = compiled
        while len(self._compiled) > CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return compiled
