"""Between protobuf and the client's types; both clients share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from salver.client.types import (
    Candidate,
    Completion,
    FinishReason,
    GenerateResult,
    Limits,
    Message,
    Model,
    Resume,
    Role,
    ScoreResult,
    ServerInfo,
    StopMatch,
    Timings,
    Token,
    TokenLogprob,
    Usage,
)
from salver.v1 import common_pb2, generation_pb2, model_pb2, tokenization_pb2

PromptLike = str | Sequence[int]
Conversation = str | Sequence[Message]
Request = TypeVar("Request")

_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "n",
    "seed",
)
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_ROLES = {
    Role.SYSTEM: generation_pb2.ROLE_SYSTEM,
    Role.USER: generation_pb2.ROLE_USER,
    Role.ASSISTANT: generation_pb2.ROLE_ASSISTANT,
    Role.TOOL: generation_pb2.ROLE_TOOL,
}
_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
}


def to_prompt(prompt: PromptLike) -> common_pb2.Prompt:
    """Text, or token ids."""
    if isinstance(prompt, str):
        return common_pb2.Prompt(text=prompt)
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=prompt))


def to_messages(conversation: Conversation) -> list[generation_pb2.Message]:
    """A conversation; a mere string is what the user says."""
    messages = [Message.user(conversation)] if isinstance(conversation, str) else conversation
    return [generation_pb2.Message(role=_ROLES[m.role], content=m.content, name=m.name) for m in messages]


def to_generation(make: type[Request], options: Mapping[str, Any], **inputs: Any) -> Request:
    """Fills any of the four generation requests from `GenerationOptions` or `ChatOptions`.

    Raises TypeError for an option that does not exist.
    """
    rest = {name: value for name, value in options.items() if value is not None and name != "timeout"}
    sampling = common_pb2.SamplingParams(**_take(rest, _SAMPLING))
    sampling.logit_bias.update(rest.pop("logit_bias", {}))
    stop = rest.pop("stop", ())
    stopping = common_pb2.StoppingParams(
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=rest.pop("stop_token_ids", ()),
        **_take(rest, _STOPPING),
    )
    fields: dict[str, Any] = {"sampling": sampling, "stopping": stopping, **inputs}
    if "logprobs" in rest or "prompt_logprobs" in rest:
        fields["logprobs"] = common_pb2.LogprobParams(
            output_top_k=rest.pop("logprobs", None), prompt_top_k=rest.pop("prompt_logprobs", None)
        )
    if "resume" in rest:
        fields["resume"] = to_resume(rest.pop("resume"))
    template_kwargs = rest.pop("template_kwargs", None)
    try:
        request = make(**fields, **rest)
    except ValueError as error:
        raise TypeError(str(error)) from error
    if template_kwargs:
        request.template_kwargs.update(template_kwargs)  # type: ignore[attr-defined]
    return request


def to_resume(resume: Resume) -> common_pb2.Resume:
    return common_pb2.Resume(
        prompt_token_ids=resume.prompt_token_ids,
        samples=[
            common_pb2.Resume.Sample(index=index, token_ids=token_ids)
            for index, token_ids in sorted(resume.samples.items())
        ],
        seed=resume.seed,
        numerics_id=resume.numerics_id,
        allow_numerics_mismatch=resume.allow_numerics_mismatch,
    )


def to_score(
    inputs: Iterable[tuple[PromptLike, PromptLike]], options: Mapping[str, Any]
) -> generation_pb2.ScoreRequest:
    rest = {name: value for name, value in options.items() if value is not None and name != "timeout"}
    pairs = [
        generation_pb2.ScoreInput(context=to_prompt(context), continuation=to_prompt(continuation))
        for context, continuation in inputs
    ]
    return generation_pb2.ScoreRequest(inputs=pairs, **rest)


def from_generation(reply: Any) -> GenerateResult:
    """Any of the four generation replies."""
    return GenerateResult(
        request_id=reply.request_id,
        model=reply.model,
        completions=tuple(_completion(c) for c in reply.completions),
        prompt_logprobs=_logprobs(reply.prompt_logprobs),
        usage=_usage(reply.usage) if reply.HasField("usage") else None,
        timings=_timings(reply.timings) if reply.HasField("timings") else None,
        seed=reply.seed,
        numerics_id=reply.numerics_id,
        prompt_token_ids=tuple(reply.prompt_token_ids),
    )


def from_score(reply: generation_pb2.ScoreResponse) -> list[ScoreResult]:
    return [ScoreResult(_logprobs(r.logprobs), r.sum, r.is_greedy) for r in reply.results]


def from_tokens(reply: tokenization_pb2.TokenizeResponse) -> list[Token]:
    return [Token(t.id, t.token, t.start, t.end) for t in reply.tokens]


def from_model(model: model_pb2.Model) -> Model:
    return Model(
        name=model.name,
        architecture=model.architecture,
        tasks=tuple(model_pb2.Task.Name(task).removeprefix("TASK_").lower() for task in model.tasks),
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
        quantization=model.quantization,
        eos_token_ids=tuple(model.eos_token_ids),
        bos_token_id=model.bos_token_id if model.HasField("bos_token_id") else None,
        weights_digest=model.weights_digest,
        embedding_dimensions=model.embedding_dimensions if model.HasField("embedding_dimensions") else None,
        labels=tuple(model.labels),
    )


def from_server_info(reply: model_pb2.GetServerInfoResponse) -> ServerInfo:
    limits = {name: getattr(reply.limits, name) for name in Limits.__dataclass_fields__}
    return ServerInfo(
        version=reply.version,
        limits=Limits(**limits),
        drain_period=_seconds(reply.drain_period),
        numerics_id=reply.numerics_id,
        device=reply.device,
        torch_version=reply.torch_version,
        startup_phases={phase.name: _seconds(phase.duration) for phase in reply.startup_phases},
        worker_restarts=reply.worker_restarts,
    )


def _take(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _completion(c: common_pb2.Completion) -> Completion:
    match = None
    which = c.stop_match.WhichOneof("match")
    if which is not None:
        match = StopMatch(**{which: getattr(c.stop_match, which)})
    return Completion(
        index=c.index,
        text=c.text,
        token_ids=tuple(c.token_ids),
        logprobs=_logprobs(c.logprobs),
        finish_reason=_FINISH_REASONS.get(c.finish_reason),
        stop_match=match,
        text_offset=c.text_offset,
        token_offset=c.token_offset,
    )


def _logprobs(logprobs: Iterable[common_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=p.token_id,
            token=p.token,
            logprob=p.logprob if p.HasField("logprob") else None,
            rank=p.rank,
            top=tuple(Candidate(c.token_id, c.token, c.logprob) for c in p.top),
        )
        for p in logprobs
    )


def _usage(usage: common_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.resumed_tokens)


def _timings(timings: common_pb2.Timings) -> Timings:
    return Timings(
        _seconds(timings.queue),
        _seconds(timings.prefill),
        _seconds(timings.decode),
        _seconds(timings.total),
        timings.steps,
        timings.preemptions,
    )
