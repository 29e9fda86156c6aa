"""The engine's results as messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from salver.model.tokenizer import Tokenizer
from salver.server.engine.accounting import Cause
from salver.server.engine.explanation import Explanation
from salver.server.engine.outputs import CompletionDelta, StopMatch
from salver.server.engine.request import FinishReason, Logprobs, SequenceTimings
from salver.v1 import common_pb2, explanation_pb2

_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
}


def duration(seconds: float) -> Duration:
    return _nanoseconds(round(seconds * 1e9))


def add_floats(message: Any, field: str, values: NDArray[Any]) -> None:
    """Adds numbers to a repeated float field as the bytes of the wire: a Python float each takes ten times
    as long, for vectors on the front's one thread."""
    raw = np.ascontiguousarray(values, dtype="<f4").tobytes()
    tag = message.DESCRIPTOR.fields_by_name[field].number << 3 | 2
    message.MergeFromString(_varint(tag) + _varint(len(raw)) + raw)


def _varint(value: int) -> bytes:
    """As protobuf writes an unsigned number: seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def token_logprob(logprobs: Logprobs, tokenizer: Tokenizer) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=logprobs.token_id,
        token=tokenizer.token_bytes(logprobs.token_id),
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top=_candidates(logprobs.top, tokenizer),
        named=_candidates(logprobs.named, tokenizer),
    )


def _candidates(candidates: Iterable[tuple[int, float]], tokenizer: Tokenizer) -> list[common_pb2.Candidate]:
    return [
        common_pb2.Candidate(token_id=token_id, token=tokenizer.token_bytes(token_id), logprob=value)
        for token_id, value in candidates
    ]


def prompt_logprobs(
    token_ids: Sequence[int], logprobs: Iterable[Logprobs], tokenizer: Tokenizer
) -> list[common_pb2.TokenLogprob]:
    """One for every token; `logprobs` are those of its last tokens, the ones before have none."""
    known = [token_logprob(item, tokenizer) for item in logprobs]
    unknown = token_ids[: len(token_ids) - len(known)]
    return [
        common_pb2.TokenLogprob(token_id=token_id, token=tokenizer.token_bytes(token_id))
        for token_id in unknown
    ] + known


def stop_match(match: StopMatch) -> common_pb2.StopMatch:
    if match.text is not None:
        return common_pb2.StopMatch(text=match.text)
    if match.token_id is not None and not match.eos:
        return common_pb2.StopMatch(token_id=match.token_id)
    return common_pb2.StopMatch(eos=True)


def completion(delta: CompletionDelta, tokenizer: Tokenizer) -> common_pb2.Completion:
    return common_pb2.Completion(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[token_logprob(item, tokenizer) for item in delta.logprobs],
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        stop_match=None if delta.stop_match is None else stop_match(delta.stop_match),
        text_offset=delta.text_offset,
        token_offset=delta.token_offset,
        score=delta.score,
    )


def timings(of_engine: SequenceTimings, total: float) -> common_pb2.Timings:
    """`total` is from arrival to reply, in seconds."""
    return common_pb2.Timings(
        queue=duration(of_engine.queue),
        prefill=duration(of_engine.prefill),
        decode=duration(of_engine.decode),
        total=duration(total),
        steps=of_engine.steps,
        preemptions=of_engine.preemptions,
    )


def explanation(found: Explanation, total: float) -> explanation_pb2.Explanation:
    """`total` is from arrival to reply, in seconds; the parts sum to it to the nanosecond."""
    parts = {cause: round(found.seconds.get(cause, 0.0) * 1e9) for cause in Cause}
    # What rounding left over, to the largest.
    parts[max(parts, key=lambda cause: parts[cause])] += round(total * 1e9) - sum(parts.values())
    return explanation_pb2.Explanation(
        parts=[
            explanation_pb2.Explanation.Part(cause=f"LATENCY_CAUSE_{cause.name}", duration=_nanoseconds(part))
            for cause, part in parts.items()
            if part > 0
        ],
        device_time=_nanoseconds(found.device_ns),
    )


def _nanoseconds(count: int) -> Duration:
    result = Duration()
    result.FromNanoseconds(count)
    return result
