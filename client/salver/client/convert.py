"""Between protobuf and the client's types; both clients share it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from salver.client.explanation import from_explanation
from salver.client.types import (
    BeamParams,
    Candidate,
    Completion,
    FinishReason,
    GenerateResult,
    Limits,
    Message,
    Model,
    Origin,
    Resume,
    Role,
    ScoreResult,
    ServerInfo,
    Setting,
    StopMatch,
    Timings,
    Token,
    TokenLogprob,
    Tool,
    ToolCall,
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
    "typical_p",
    "no_repeat_ngram_size",
    "bad_words",
    "allowed_words",
    "allowed_token_ids",
)
_STRUCTURED = ("json_schema", "json_object", "regex", "grammar", "choice")
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_ROLES = {
    Role.SYSTEM: generation_pb2.ROLE_SYSTEM,
    Role.USER: generation_pb2.ROLE_USER,
    Role.ASSISTANT: generation_pb2.ROLE_ASSISTANT,
    Role.TOOL: generation_pb2.ROLE_TOOL,
}
_TOOL_MODES = {
    "auto": generation_pb2.ToolChoice.MODE_AUTO,
    "none": generation_pb2.ToolChoice.MODE_NONE,
    "required": generation_pb2.ToolChoice.MODE_REQUIRED,
}
_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
}
_EARLY_STOPPING: dict[bool | str, common_pb2.BeamParams.EarlyStopping] = {
    False: common_pb2.BeamParams.EARLY_STOPPING_HEURISTIC,
    True: common_pb2.BeamParams.EARLY_STOPPING_FIRST,
    "never": common_pb2.BeamParams.EARLY_STOPPING_NEVER,
}
_ORIGINS = {
    common_pb2.CONFIGURATION_ORIGIN_REQUEST: Origin.REQUEST,
    common_pb2.CONFIGURATION_ORIGIN_CHECKPOINT: Origin.CHECKPOINT,
    common_pb2.CONFIGURATION_ORIGIN_SERVER: Origin.SERVER,
}


def to_prompt(prompt: PromptLike) -> common_pb2.Prompt:
    """Text, or token ids."""
    if isinstance(prompt, str):
        return common_pb2.Prompt(text=prompt)
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=prompt))


def to_messages(conversation: Conversation) -> list[generation_pb2.Message]:
    """A conversation; a mere string is what the user says."""
    messages = [Message.user(conversation)] if isinstance(conversation, str) else conversation
    return [
        generation_pb2.Message(
            role=_ROLES[m.role],
            content=m.content,
            name=m.name,
            tool_calls=[
                common_pb2.ToolCall(index=c.index, id=c.id, name=c.name, arguments=c.arguments)
                for c in m.tool_calls
            ],
            tool_call_id=m.tool_call_id,
        )
        for m in messages
    ]


def to_tools(tools: Iterable[Tool]) -> list[generation_pb2.Tool]:
    return [
        generation_pb2.Tool(
            name=tool.name,
            description=tool.description,
            parameters=json.dumps(dict(tool.parameters)) if tool.parameters else "",
        )
        for tool in tools
    ]


def to_tool_choice(choice: str) -> generation_pb2.ToolChoice:
    """Of "auto", "none", "required" or a tool's name."""
    mode = _TOOL_MODES.get(choice)
    return generation_pb2.ToolChoice(name=choice) if mode is None else generation_pb2.ToolChoice(mode=mode)


def to_generation(make: type[Request], options: Mapping[str, Any], **inputs: Any) -> Request:
    """Fills any of the four generation requests from `GenerationOptions` or `ChatOptions`.

    Raises TypeError for an option that does not exist.
    """
    rest = {name: value for name, value in options.items() if value is not None and name != "timeout"}
    sampling = common_pb2.SamplingParams(**_take(rest, _SAMPLING))
    sampling.logit_bias.update(rest.pop("logit_bias", {}))
    for ids in rest.pop("bad_token_sequences", ()):
        sampling.bad_token_sequences.add(ids=ids)
    stop = rest.pop("stop", ())
    stopping = common_pb2.StoppingParams(
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=rest.pop("stop_token_ids", ()),
        **_take(rest, _STOPPING),
    )
    fields: dict[str, Any] = {"sampling": sampling, "stopping": stopping, **inputs}
    if not rest.keys().isdisjoint(("logprobs", "prompt_logprobs", "logprob_token_ids")):
        fields["logprobs"] = common_pb2.LogprobParams(
            output_top_k=rest.pop("logprobs", None),
            prompt_top_k=rest.pop("prompt_logprobs", None),
            token_ids=rest.pop("logprob_token_ids", ()),
        )
    structured = _take(rest, _STRUCTURED)
    if structured:
        fields["structured_output"] = to_structured_output(structured)
    if "tools" in rest:
        fields["tools"] = to_tools(rest.pop("tools"))
    if "tool_choice" in rest:
        fields["tool_choice"] = to_tool_choice(rest.pop("tool_choice"))
    if "beams" in rest:
        fields["beams"] = to_beams(rest.pop("beams"))
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


def to_structured_output(options: Mapping[str, Any]) -> generation_pb2.StructuredOutput:
    """Of the one option that says what the text must be. Raises TypeError for several."""
    if len(options) > 1:
        raise TypeError(f"only one of {', '.join(options)} can be given")
    ((form, value),) = options.items()
    if form == "json_schema" and not isinstance(value, str):
        value = json.dumps(value)
    elif form == "choice":
        value = generation_pb2.StructuredOutput.Choice(options=value)
    return generation_pb2.StructuredOutput(**{form: value})


def to_beams(beams: int | BeamParams) -> common_pb2.BeamParams:
    """Raises TypeError for an early_stopping that is none."""
    if not isinstance(beams, BeamParams):
        return common_pb2.BeamParams(num_beams=beams)
    early_stopping = common_pb2.BeamParams.EARLY_STOPPING_UNSPECIFIED
    if beams.early_stopping is not None:
        if beams.early_stopping not in _EARLY_STOPPING:
            raise TypeError(f'early_stopping is {beams.early_stopping!r}, not True, False or "never"')
        early_stopping = _EARLY_STOPPING[beams.early_stopping]
    return common_pb2.BeamParams(
        num_beams=beams.num_beams, length_penalty=beams.length_penalty, early_stopping=early_stopping
    )


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
        configuration=_configuration(reply.configuration),
        weights_version=reply.weights_version,
        explanation=from_explanation(reply.explanation) if reply.HasField("explanation") else None,
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
        base=model.base,
        embedding_dimensions=model.embedding_dimensions if model.HasField("embedding_dimensions") else None,
        labels=tuple(model.labels),
        weights_version=model.weights_version,
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
        weights_version=reply.weights_version,
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
        content=c.content,
        reasoning=c.reasoning,
        tool_calls=tuple(ToolCall(t.name, t.arguments, t.id, t.index) for t in c.tool_calls),
        score=c.score if c.HasField("score") else None,
    )


def _logprobs(logprobs: Iterable[common_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=p.token_id,
            token=p.token,
            logprob=p.logprob if p.HasField("logprob") else None,
            rank=p.rank,
            top=_candidates(p.top),
            named=_candidates(p.named),
        )
        for p in logprobs
    )


def _candidates(candidates: Iterable[common_pb2.Candidate]) -> tuple[Candidate, ...]:
    return tuple(Candidate(c.token_id, c.token, c.logprob) for c in candidates)


def _configuration(configuration: common_pb2.GenerationConfiguration) -> dict[str, Setting]:
    settings = {}
    early_stopping = {value: name for name, value in _EARLY_STOPPING.items()}
    for prefix in ("sampling", "stopping", "beams"):
        part = getattr(configuration, prefix)
        for field in part.DESCRIPTOR.fields:
            path = f"{prefix}.{field.name}"
            origin = _ORIGINS.get(configuration.origins[path]) if path in configuration.origins else None
            if origin is None:
                continue
            value = _plain(getattr(part, field.name))
            settings[field.name] = Setting(
                early_stopping[value] if field.name == "early_stopping" else value, origin
            )
    return settings


def _plain(value: Any) -> Any:
    """A field's value without protobuf: a number, a text, a tuple or a dict."""
    if isinstance(value, common_pb2.TokenIds):
        return tuple(value.ids)
    if isinstance(value, float):
        return float(f"{value:.7g}")  # of 32 bits on the wire
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(item) for item in value)
    return value


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
