"""The deltas of a stream put together again: the whole answer so far, and how to resume it."""

from __future__ import annotations

from dataclasses import replace

from salver.client.types import Completion, GenerateResult, Resume, ToolCall


class Accumulator:
    """Takes the messages of one stream in order."""

    def __init__(self, resumed: Resume | None = None) -> None:
        self.resumed = resumed
        self._completions: dict[int, Completion] = {}
        self._result = GenerateResult("", "", ())

    def add(self, delta: GenerateResult) -> None:
        for part in delta.completions:
            whole = self._completions.get(part.index)
            self._completions[part.index] = part if whole is None else _joined(whole, part)
        known = self._result
        self._result = replace(
            delta,
            prompt_logprobs=known.prompt_logprobs + delta.prompt_logprobs,
            prompt_token_ids=known.prompt_token_ids or delta.prompt_token_ids,
            configuration=known.configuration or delta.configuration,
        )

    @property
    def started(self) -> bool:
        """Whether a message has come, so that there is something to resume from."""
        return bool(self._result.numerics_id)

    def completion(self, index: int) -> Completion | None:
        """What has come of one sample."""
        return self._completions.get(index)

    def num_tokens(self, index: int) -> int:
        """Tokens of one sample, those included that a `Resume` brought."""
        came = self._completions.get(index)
        before = self.resumed.samples.get(index, ()) if self.resumed else ()
        return len(before) + (len(came.token_ids) if came else 0)

    @property
    def result(self) -> GenerateResult:
        """All that has come; complete once the stream has ended. Offsets are those of the first deltas."""
        return replace(
            self._result, completions=tuple(self._completions[index] for index in sorted(self._completions))
        )

    def resume(self) -> Resume:
        """What another call needs to go on from here. Raises ValueError before the first message."""
        result = self.result
        if not self.started:
            raise ValueError("nothing has come yet: start anew instead of resuming")
        before = self.resumed.samples if self.resumed else {}
        samples = {index: tuple(tokens) for index, tokens in before.items()}
        for completion in result.completions:
            samples[completion.index] = (*samples.get(completion.index, ()), *completion.token_ids)
        allow = self.resumed is not None and self.resumed.allow_numerics_mismatch
        return Resume(samples, result.seed, result.numerics_id, result.prompt_token_ids, allow)


def _joined(whole: Completion, part: Completion) -> Completion:
    return replace(
        whole,
        text=whole.text + part.text,
        token_ids=whole.token_ids + part.token_ids,
        logprobs=whole.logprobs + part.logprobs,
        finish_reason=part.finish_reason or whole.finish_reason,
        stop_match=part.stop_match or whole.stop_match,
        content=whole.content + part.content,
        reasoning=whole.reasoning + part.reasoning,
        tool_calls=_joined_calls(whole.tool_calls, part.tool_calls),
    )


def _joined_calls(whole: tuple[ToolCall, ...], part: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
    calls = list(whole)
    for delta in part:
        if calls and calls[-1].index == delta.index:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + delta.arguments)
        else:
            calls.append(delta)
    return tuple(calls)
