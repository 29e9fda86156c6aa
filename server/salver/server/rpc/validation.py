"""Whether a request can be served, every bad field at once.

Functions named `check_*` collect Violations; what needs the tokens of the prompt comes
after tokenization. Field paths are those of the proto (`sampling.temperature`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from salver.server.engine.request import BeamParams, SamplingParams, StoppingParams
from salver.server.rpc.beams import check_beams, settle_beams
from salver.server.rpc.calls import current_call
from salver.server.rpc.configuration import CHECKPOINT, Configuration, in_force
from salver.server.rpc.errors import (
    NUMERICS_MISMATCH,
    ApiError,
    Violation,
    invalid_argument,
    out_of_range,
    shortened,
)
from salver.server.rpc.served import RequestLimits, ServedModel
from salver.v1 import common_pb2, generation_pb2

MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 256
MAX_PRIORITY = 10


class Violations:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(Violation(field, description))

    def raise_any(self) -> None:
        """Raises ApiError (INVALID_ARGUMENT) when something was found."""
        if self.found:
            raise invalid_argument(self.found)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """A generation request's parameters, checked, with defaults filled in; the prompt comes apart.

    Words are text still; the sampling parameters have none of them.
    """

    configuration: Configuration
    sampling: SamplingParams  # its seed is 0 when `seed` is None
    seed: int | None
    n: int
    max_tokens: int | None
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    include_stop: bool
    output_top_k: int | None
    prompt_top_k: int | None
    logprob_token_ids: tuple[int, ...]
    priority: int
    cache_salt: str
    resumed: dict[int, tuple[int, ...]]
    resumed_prompt: tuple[int, ...] | None
    beams: BeamParams | None = None


def model_named(name: str, model: ServedModel) -> ServedModel:
    """The served model when `name` is empty or its own, or one of its adapters'.

    Raises ApiError (NOT_FOUND) for another name.
    """
    if not name or name == model.name:
        return model
    found = model.with_adapter.get(name)
    if found is None:
        served = ", ".join(repr(known) for known in (model.name, *model.with_adapter))
        raise ApiError(
            grpc.StatusCode.NOT_FOUND,
            f"model {shortened(name)!r} is not served here; {served} is",
            reason="MODEL_NOT_FOUND",
        )
    if (call := current_call()) is not None:
        call.adapter = found.adapter
    return found


def check_request_id(request_id: str, violations: Violations) -> None:
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        violations.add("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")


def check_priority(request: Any, violations: Violations) -> int:
    priority = int(request.priority) if request.HasField("priority") else 0
    if abs(priority) > MAX_PRIORITY:
        violations.add("priority", f"{priority} must be between -{MAX_PRIORITY} and {MAX_PRIORITY}")
    return priority


def check_token_ids(ids: Sequence[int], field: str, vocab_size: int, violations: Violations) -> None:
    """Every id must be one of the vocabulary; the first that is not is named."""
    if not ids or max(ids) < vocab_size:  # fast, for there can be millions
        return
    for position, token_id in enumerate(ids):
        if token_id >= vocab_size:
            violations.add(
                f"{field}[{position}]", f"{token_id} is not in the vocabulary of {vocab_size} tokens"
            )
            return


def check_prompt(
    prompt: common_pb2.Prompt,
    field: str,
    vocab_size: int,
    violations: Violations,
    *,
    may_be_empty: bool = False,
) -> None:
    """A prompt must be there and its ids in the vocabulary; tokenizing may still leave it empty."""
    kind = prompt.WhichOneof("prompt")
    if kind == "token_ids":
        check_token_ids(prompt.token_ids.ids, f"{field}.token_ids.ids", vocab_size, violations)
        if not prompt.token_ids.ids and not may_be_empty:
            violations.add(f"{field}.token_ids.ids", "must not be empty")
    elif kind == "text":
        if not prompt.text and not may_be_empty:
            violations.add(f"{field}.text", "must not be empty")
    elif not may_be_empty:
        violations.add(field, "must be text or token_ids")


def check_generation(request: Any, model: ServedModel, violations: Violations) -> GenerationParams:
    """All parameters that Generate and Chat share. Nothing is raised for violations here.

    Raises ApiError (FAILED_PRECONDITION) for a Resume of other numerics.
    """
    limits = model.limits
    check_request_id(request.request_id, violations)
    if len(request.cache_salt) > MAX_CACHE_SALT:
        violations.add("cache_salt", f"must be at most {MAX_CACHE_SALT} characters")
    priority = check_priority(request, violations)
    configuration = in_force(request, model.defaults)
    settle_beams(request, configuration, model.defaults)
    sampling, seed, n = _check_sampling(configuration.sampling, limits, violations)
    stopping = configuration.stopping
    max_tokens, min_tokens = _check_stopping(stopping, limits, violations)
    output_top_k, prompt_top_k = (
        _check_top_k(request.logprobs, name, f"logprobs.{name}", limits, violations)
        for name in ("output_top_k", "prompt_top_k")
    )
    named = request.logprobs.token_ids
    if len(named) > limits.max_logprob_token_ids:
        violations.add("logprobs.token_ids", f"must be at most {limits.max_logprob_token_ids}")
    else:
        check_token_ids(named, "logprobs.token_ids", limits.vocab_size, violations)
    if named and output_top_k is None:
        output_top_k = 0
    resumed: dict[int, tuple[int, ...]] = {}
    resumed_prompt: tuple[int, ...] | None = None
    if request.HasField("resume"):
        resume = request.resume
        resumed = _check_resumed_samples(resume, n, max_tokens, limits, violations)
        check_token_ids(
            resume.prompt_token_ids, "resume.prompt_token_ids", model.input_vocab_size, violations
        )
        resumed_prompt = tuple(resume.prompt_token_ids) or None
        if request.sampling.HasField("seed"):
            if resume.seed and resume.seed != seed:
                violations.add("resume.seed", f"{resume.seed} is not the seed of sampling ({seed})")
        elif resume.seed:
            seed = resume.seed
        elif sampling.temperature > 0:
            violations.add("resume.seed", "is needed to go on sampling: the seed of the reply that was cut")
        _check_numerics(resume, model, violations)
    return GenerationParams(
        configuration=configuration,
        sampling=sampling,
        seed=seed,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=frozenset(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop=stopping.include_stop,
        output_top_k=output_top_k,
        prompt_top_k=prompt_top_k,
        logprob_token_ids=tuple(named),
        priority=priority,
        cache_salt=request.cache_salt,
        resumed=resumed,
        resumed_prompt=resumed_prompt,
        beams=check_beams(request, configuration, limits, violations),
    )


def check_next_token(
    request: Any, model: ServedModel, violations: Violations
) -> tuple[Configuration, SamplingParams, StoppingParams]:
    """What decides about one token of a GetDistributionRequest; words are text still."""
    limits = model.limits
    for part, names in (("sampling", ("n", "seed")), ("stopping", ("max_tokens", "stop", "include_stop"))):
        said = {field.name for field, _ in getattr(request, part).ListFields()}
        for name in names:
            if name in said:
                violations.add(f"{part}.{name}", "does nothing to the distribution of one token")
    configuration = in_force(request, model.defaults)
    sampling, _, _ = _check_sampling(configuration.sampling, limits, violations)
    stopping = configuration.stopping
    _, min_tokens = _check_stopping(stopping, limits, violations)
    stop_token_ids = frozenset(stopping.stop_token_ids)
    if not stopping.ignore_eos:
        stop_token_ids |= frozenset(model.tokenizer.eos_token_ids)
    return configuration, sampling, StoppingParams(0, min_tokens, stop_token_ids)


def _check_sampling(
    proto: common_pb2.SamplingParams, limits: RequestLimits, violations: Violations
) -> tuple[SamplingParams, int | None, int]:
    defaults = SamplingParams()

    def number(name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
        value = float(getattr(proto, name)) if proto.HasField(name) else float(getattr(defaults, name))
        below = value <= low if open_low else value < low
        if not math.isfinite(value):
            violations.add(f"sampling.{name}", f"{value} is not a finite number")
        elif below or value > high:
            bound = f"above {low:g}" if open_low else f"at least {low:g}"
            if high != math.inf:
                bound += f" and at most {high:g}"
            violations.add(f"sampling.{name}", f"{value:g} must be {bound}")
        return value

    temperature = number("temperature", 0)
    top_p = number("top_p", 0, 1, open_low=True)
    min_p = number("min_p", 0, 1)
    repetition_penalty = number("repetition_penalty", 0, open_low=True)
    presence_penalty = number("presence_penalty", -2, 2)
    frequency_penalty = number("frequency_penalty", -2, 2)
    if len(proto.logit_bias) > limits.max_logit_bias:
        violations.add("sampling.logit_bias", f"must have at most {limits.max_logit_bias} entries")
    else:
        for token_id, bias in sorted(proto.logit_bias.items()):
            field = f"sampling.logit_bias[{token_id}]"
            if token_id >= limits.vocab_size:
                violations.add(field, f"is not in the vocabulary of {limits.vocab_size} tokens")
            if not -100 <= bias <= 100:  # NaN too
                violations.add(field, f"{bias:g} must be between -100 and 100")
    typical_p = number("typical_p", 0, 1, open_low=True)
    _check_words(proto, limits, violations)
    n = proto.n if proto.HasField("n") else 1
    if not 1 <= n <= limits.max_samples:
        violations.add("sampling.n", f"{n} must be between 1 and {limits.max_samples}")
    sampling = SamplingParams(
        temperature=temperature,
        top_k=proto.top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=tuple(sorted(proto.logit_bias.items())),
        typical_p=typical_p,
        no_repeat_ngram_size=proto.no_repeat_ngram_size,
        bad_words=tuple(tuple(word.ids) for word in proto.bad_token_sequences),
        allowed_token_ids=tuple(sorted(set(proto.allowed_token_ids))),
    )
    return sampling, proto.seed if proto.HasField("seed") else None, n


def _check_words(proto: common_pb2.SamplingParams, limits: RequestLimits, violations: Violations) -> None:
    for name in ("bad_words", "allowed_words"):
        words = getattr(proto, name)
        if len(words) > limits.max_words:
            violations.add(f"sampling.{name}", f"must be at most {limits.max_words} strings")
            continue
        for position, word in enumerate(words):
            if not word:
                violations.add(f"sampling.{name}[{position}]", "must not be empty")
            elif len(word) > limits.max_word_length:
                violations.add(
                    f"sampling.{name}[{position}]", f"must be at most {limits.max_word_length} characters"
                )
    if len(proto.bad_token_sequences) > limits.max_words:
        violations.add("sampling.bad_token_sequences", f"must be at most {limits.max_words}")
    else:
        for position, sequence in enumerate(proto.bad_token_sequences):
            field = f"sampling.bad_token_sequences[{position}].ids"
            if not 1 <= len(sequence.ids) <= limits.max_word_length:
                violations.add(field, f"must be between 1 and {limits.max_word_length} ids")
            else:
                check_token_ids(sequence.ids, field, limits.vocab_size, violations)
    if len(proto.allowed_token_ids) > limits.max_allowed_token_ids:
        violations.add("sampling.allowed_token_ids", f"must be at most {limits.max_allowed_token_ids} ids")
    else:
        check_token_ids(proto.allowed_token_ids, "sampling.allowed_token_ids", limits.vocab_size, violations)


def _check_stopping(
    proto: common_pb2.StoppingParams, limits: RequestLimits, violations: Violations
) -> tuple[int | None, int]:
    max_tokens = proto.max_tokens if proto.HasField("max_tokens") else None
    if max_tokens == 0:
        violations.add("stopping.max_tokens", "must be at least 1; unset means to the end of the context")
    min_tokens = proto.min_tokens
    if max_tokens and min_tokens > max_tokens:
        violations.add("stopping.min_tokens", f"{min_tokens} must be at most max_tokens ({max_tokens})")
    if len(proto.stop) > limits.max_stop_strings:
        violations.add("stopping.stop", f"must be at most {limits.max_stop_strings} strings")
    else:
        for position, text in enumerate(proto.stop):
            if not text:
                violations.add(f"stopping.stop[{position}]", "must not be empty")
            elif len(text) > limits.max_stop_characters:
                violations.add(
                    f"stopping.stop[{position}]", f"must be at most {limits.max_stop_characters} characters"
                )
    if len(proto.stop_token_ids) > limits.max_stop_token_ids:
        violations.add("stopping.stop_token_ids", f"must be at most {limits.max_stop_token_ids} ids")
    else:
        check_token_ids(proto.stop_token_ids, "stopping.stop_token_ids", limits.vocab_size, violations)
    return max_tokens, min_tokens


def _check_top_k(
    message: Any, name: str, field: str, limits: RequestLimits, violations: Violations
) -> int | None:
    if not message.HasField(name):
        return None
    value = int(getattr(message, name))
    if value > limits.max_top_logprobs:
        violations.add(field, f"{value} must be at most {limits.max_top_logprobs}")
    return value


def check_score_top_k(request: Any, limits: RequestLimits, violations: Violations) -> int | None:
    """The `top_k` of a ScoreRequest; None when unset."""
    return _check_top_k(request, "top_k", "top_k", limits, violations)


def _check_resumed_samples(
    resume: common_pb2.Resume, n: int, max_tokens: int | None, limits: RequestLimits, violations: Violations
) -> dict[int, tuple[int, ...]]:
    resumed: dict[int, tuple[int, ...]] = {}
    for position, sample in enumerate(resume.samples):
        field = f"resume.samples[{position}]"
        if sample.index >= n:
            violations.add(f"{field}.index", f"{sample.index} must be below n ({n})")
        elif sample.index in resumed:
            violations.add(f"{field}.index", f"{sample.index} is there twice")
        if max_tokens and len(sample.token_ids) > max_tokens:
            violations.add(
                f"{field}.token_ids", f"are {len(sample.token_ids)}, more than max_tokens ({max_tokens})"
            )
        check_token_ids(sample.token_ids, f"{field}.token_ids", limits.vocab_size, violations)
        resumed[sample.index] = tuple(sample.token_ids)
    return resumed


def _check_numerics(resume: common_pb2.Resume, model: ServedModel, violations: Violations) -> None:
    ours = model.ready.numerics_id
    if resume.allow_numerics_mismatch or resume.numerics_id == ours:
        return
    violations.raise_any()  # a bad field is the client's to repair first
    theirs = shortened(resume.numerics_id) or "(none)"
    raise ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"the reply to resume was computed with numerics {theirs}, this server computes with {ours}; "
        "set resume.allow_numerics_mismatch to go on with other numerics",
        reason=NUMERICS_MISMATCH,
        metadata={"requested": theirs, "served": ours},
    )


def check_messages(messages: Sequence[Any], field: str, violations: Violations) -> None:
    """Messages of a conversation: at least one, with known roles."""
    if not messages:
        violations.add(field, "must not be empty")
    known = set(generation_pb2.Role.values()) - {generation_pb2.ROLE_UNSPECIFIED}
    for position, message in enumerate(messages):
        if message.role not in known:
            problem = "must be set" if message.role == 0 else f"{message.role} is not a role"
            violations.add(f"{field}[{position}].role", problem)


def room_for(params: GenerationParams, prompt_tokens: int, limits: RequestLimits) -> int:
    """As `room`; a max_tokens that is the checkpoint's default gives way to the context."""
    if params.configuration.origins["stopping.max_tokens"] == CHECKPOINT and params.max_tokens is not None:
        return min(params.max_tokens, room(prompt_tokens, None, limits))
    return room(prompt_tokens, params.max_tokens, limits)


def room(prompt_tokens: int, max_tokens: int | None, limits: RequestLimits) -> int:
    """How many tokens may be generated after a prompt of so many.

    Raises ApiError (OUT_OF_RANGE) when the prompt, or prompt and max_tokens, exceed the context
    or what the whole cache holds; never truncates.
    """
    context, cache = limits.max_model_len, limits.cache_tokens
    capacity = limits.capacity
    what, size = ("context", context) if context <= cache else (limits.cache_name, cache)
    numbers = {"prompt_tokens": prompt_tokens, "max_model_len": context, "kv_cache_tokens": cache}
    if prompt_tokens >= capacity:
        raise out_of_range(
            f"the prompt is {prompt_tokens} tokens; the {what} holds {size}, one at least of it for output",
            **numbers,
        )
    if max_tokens is None:
        return capacity - prompt_tokens
    if prompt_tokens + max_tokens > capacity:
        raise out_of_range(
            f"the prompt is {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}; the {what} holds {size}",
            **numbers,
            max_tokens=max_tokens,
        )
    return max_tokens


def check_score_length(num_tokens: int, field: str, limits: RequestLimits) -> None:
    """Raises ApiError (OUT_OF_RANGE) when context and continuation exceed the context or the cache."""
    if num_tokens > limits.capacity:
        what = "context" if limits.max_model_len <= limits.cache_tokens else "key-value cache"
        raise out_of_range(
            f"{field} is {num_tokens} tokens; the {what} holds {limits.capacity}",
            prompt_tokens=num_tokens,
            max_model_len=limits.max_model_len,
            kv_cache_tokens=limits.cache_tokens,
        )


def stopping_of(params: GenerationParams, max_tokens: int, eos_token_ids: Sequence[int]) -> StoppingParams:
    """The engine's stopping parameters: end-of-sequence ids are stop ids unless ignored."""
    stop_token_ids = params.stop_token_ids
    if not params.ignore_eos:
        stop_token_ids |= frozenset(eos_token_ids)
    return StoppingParams(max_tokens=max_tokens, min_tokens=params.min_tokens, stop_token_ids=stop_token_ids)
