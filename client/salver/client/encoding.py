"""What EncodingService answers, as plain frozen data, and its calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from salver.client.convert import PromptLike, to_prompt
from salver.client.options import DEFAULT_TIMEOUT
from salver.v1 import encoding_pb2

Texts = str | Sequence[str]
TextOrPair = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """A token, its place in the text (code points) and its vector."""

    token_id: int
    token: bytes
    start: int
    end: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of an input, or (`per_token`) those of its tokens."""

    values: tuple[float, ...]
    tokens: tuple[TokenEmbedding, ...]
    num_tokens: int
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """`index` is of the documents that were given; `document` is empty unless asked for."""

    index: int
    score: float
    document: str
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label of the checkpoint and its score."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classification:
    """Labels, best first."""

    labels: tuple[LabelScore, ...]
    num_tokens: int
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class LabelledSpan:
    """A label over a part of the text; places in code points."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenClassification:
    """The spans of one text, in order."""

    spans: tuple[LabelledSpan, ...]
    num_tokens: int
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class MaskCandidate:
    """A token that may stand in a mask's place, as the vocabulary spells it."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class FilledMask:
    """A mask, its place in the text and its candidates, most probable first."""

    start: int
    end: int
    candidates: tuple[MaskCandidate, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of the context, with its place in code points; `no_answer`: the context has none."""

    text: str
    start: int
    end: int
    score: float
    no_answer: bool


class EncodingOptions(TypedDict, total=False):
    """Keyword arguments of every encoding call. `truncate`: leave out the end of what is too long."""

    truncate: bool
    priority: int
    request_id: str
    model: str
    timeout: float


class EmbedOptions(EncodingOptions, total=False):
    """`pooling` is cls, mean, max, last_token or weighted_mean."""

    dimensions: int
    normalize: bool
    prompt_name: str
    per_token: bool
    pooling: str


class RerankOptions(EncodingOptions, total=False):
    """What a ranking takes besides."""

    top_n: int
    raw_scores: bool
    return_documents: bool


class ClassifyOptions(EncodingOptions, total=False):
    """`activation` is identity, sigmoid or softmax."""

    top_k: int
    activation: str


class ClassifyTokensOptions(EncodingOptions, total=False):
    """`aggregation` is none, simple, first, average or max."""

    aggregation: str
    include_outside: bool


class FillMaskOptions(EncodingOptions, total=False):
    """Either `top_k` candidates for each mask, or the probabilities of `targets`."""

    top_k: int
    targets: Sequence[str]


class ExtractAnswerOptions(TypedDict, total=False):
    """Long contexts are read in windows that overlap by `stride` tokens."""

    top_k: int
    max_answer_tokens: int
    stride: int
    allow_no_answer: bool
    priority: int
    request_id: str
    model: str
    timeout: float


# --- requests ---


def embed_request(inputs: PromptLike | Iterable[PromptLike], options: EmbedOptions) -> Any:
    prompts = [inputs] if isinstance(inputs, str) else list(inputs)
    if prompts and all(isinstance(prompt, int) for prompt in prompts):
        raise TypeError("embed takes a sequence of prompts; for one prompt of token ids write [ids]")
    fields = _fields(options, pooling="POOLING")
    return encoding_pb2.EmbedRequest(inputs=[to_prompt(p) for p in prompts], **fields)  # type: ignore[arg-type]


def rerank_request(query: str, documents: Texts, options: RerankOptions) -> Any:
    return encoding_pb2.RerankRequest(query=query, documents=_texts(documents), **_fields(options))


def classify_request(inputs: TextOrPair | Sequence[TextOrPair], options: ClassifyOptions) -> Any:
    several = [inputs] if isinstance(inputs, str | tuple) else inputs
    texts = [
        encoding_pb2.TextInput(text=item)
        if isinstance(item, str)
        else encoding_pb2.TextInput(text=item[0], pair=item[1])
        for item in several
    ]
    return encoding_pb2.ClassifyRequest(inputs=texts, **_fields(options, activation="ACTIVATION"))


def classify_tokens_request(inputs: Texts, options: ClassifyTokensOptions) -> Any:
    fields = _fields(options, aggregation="AGGREGATION")
    return encoding_pb2.ClassifyTokensRequest(inputs=_texts(inputs), **fields)


def fill_mask_request(inputs: Texts, options: FillMaskOptions) -> Any:
    return encoding_pb2.FillMaskRequest(inputs=_texts(inputs), **_fields(options))


def extract_answer_request(question: str, context: str, options: ExtractAnswerOptions) -> Any:
    return encoding_pb2.ExtractAnswerRequest(question=question, context=context, **_fields(options))


def timeout_of(options: Any) -> float:
    """Seconds of a call."""
    return float(options.get("timeout") or DEFAULT_TIMEOUT)


def _texts(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _fields(options: Any, **enums: str) -> dict[str, Any]:
    """The options as fields; those of `enums` by name. Raises TypeError for one that does not exist."""
    fields = {name: value for name, value in options.items() if name != "timeout" and value is not None}
    for name, prefix in enums.items():
        if name in fields:
            value = f"{prefix}_{str(fields[name]).upper()}"
            if not hasattr(encoding_pb2, value):
                raise TypeError(f"{name} {fields[name]!r} does not exist")
            fields[name] = getattr(encoding_pb2, value)
    return fields


# --- replies ---


def embeddings(reply: Any) -> list[Embedding]:
    return [
        Embedding(
            tuple(e.values),
            tuple(TokenEmbedding(t.token_id, t.token, t.start, t.end, tuple(t.values)) for t in e.tokens),
            e.num_tokens,
            e.truncated_tokens,
        )
        for e in reply.embeddings
    ]


def ranking(reply: Any) -> list[RankedDocument]:
    return [RankedDocument(r.index, r.score, r.document, r.truncated_tokens) for r in reply.results]


def classifications(reply: Any) -> list[Classification]:
    return [
        Classification(
            tuple(LabelScore(label.label, label.score) for label in r.labels),
            r.num_tokens,
            r.truncated_tokens,
        )
        for r in reply.results
    ]


def token_classifications(reply: Any) -> list[TokenClassification]:
    return [
        TokenClassification(
            tuple(LabelledSpan(s.label, s.score, s.text, s.start, s.end) for s in r.spans),
            r.num_tokens,
            r.truncated_tokens,
        )
        for r in reply.results
    ]


def fillings(reply: Any) -> list[tuple[FilledMask, ...]]:
    """Of each text its masks."""
    return [
        tuple(
            FilledMask(
                mask.start,
                mask.end,
                tuple(MaskCandidate(c.token_id, c.token, c.probability) for c in mask.candidates),
            )
            for mask in result.masks
        )
        for result in reply.results
    ]


def answers(reply: Any) -> list[Answer]:
    return [Answer(a.text, a.start, a.end, a.score, a.no_answer) for a in reply.answers]
