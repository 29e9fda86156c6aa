"""EncodingService and InspectionService of a FakeServer: made-up answers that behave as real ones do.

What depends on a model is made of the words of a text: texts with common words have vectors that are near,
documents that share words with a query stand before others, capitalized words are entities, and the sentence
that shares most with a question answers it. Labels, masks and next tokens are drawn by the text.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from salver.v1 import (
    common_pb2,
    encoding_pb2,
    encoding_pb2_grpc,
    inspection_pb2,
    inspection_pb2_grpc,
    model_pb2,
)

Accept = Callable[[Any, grpc.ServicerContext], None]  # counts a request, or ends the call as planned
TokenId = Callable[[str], int]

DIMENSIONS = 32
LABELS = ("negative", "neutral", "positive")
LAYERS = HEADS = 2
MASK = "[MASK]"
WORDS = ("the", "sea", "was", "calm", "and", "old", "warm", "far")
TASKS = ("EMBED", "RERANK", "CLASSIFY", "CLASSIFY_TOKENS", "FILL_MASK", "EXTRACT_ANSWER")
_VIEW_OF_HEADS = (inspection_pb2.ATTENTION_VIEW_UNSPECIFIED, inspection_pb2.ATTENTION_VIEW_RAW)


class _Service:
    def __init__(self, accept: Accept, numerics_id: str, token_id: TokenId) -> None:
        self._accept = accept
        self._numerics_id = numerics_id
        self._token_id = token_id

    def _checked(
        self,
        request: Any,
        context: grpc.ServicerContext,
        *,
        lists: Sequence[str] = (),
        texts: Sequence[str] = (),
    ) -> None:
        """Accepts the call; what is empty is refused by its name, as a real server does."""
        self._accept(request, context)
        for name in (*lists, *texts):
            if not getattr(request, name):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: must not be empty")

    def _reply(self, kind: Any, request: Any, texts: Iterable[str], **fields: Any) -> Any:
        return kind(
            request_id=request.request_id or "fake",
            model="fake",
            usage=common_pb2.Usage(prompt_tokens=sum(len(words_of(text)) for text in texts)),
            numerics_id=self._numerics_id,
            **fields,
        )


class FakeEncoding(_Service, encoding_pb2_grpc.EncodingServiceServicer):
    """Every task, of one and the same made-up checkpoint."""

    def Embed(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, lists=("inputs",))
        texts = [text_of(prompt) for prompt in request.inputs]
        size = request.dimensions or DIMENSIONS
        if size > DIMENSIONS:
            problem = f"dimensions: {size} must be between 1 and {DIMENSIONS}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        normalize = request.normalize if request.HasField("normalize") else True
        embeddings = []
        for text in texts:
            words = words_of(text)
            made = encoding_pb2.Embedding(num_tokens=len(words))
            if request.per_token:
                for word, start, end in words:
                    made.tokens.add(
                        token_id=self._token_id(word), token=word.encode(), start=start, end=end,
                        values=vector_of(word),
                    )  # fmt: skip
            else:
                made.values.extend(text_vector(text, size, normalize))
            embeddings.append(made)
        return self._reply(encoding_pb2.EmbedResponse, request, texts, embeddings=embeddings)

    def Rerank(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, lists=("documents",), texts=("query",))
        logits = [6 * common_words(request.query, document) - 3 for document in request.documents]
        order = sorted(range(len(logits)), key=lambda i: -logits[i])
        if request.HasField("top_n"):
            order = order[: request.top_n]
        results = [
            encoding_pb2.RankedDocument(
                index=i,
                score=logits[i] if request.raw_scores else 1 / (1 + math.exp(-logits[i])),
                document=request.documents[i] if request.return_documents else "",
            )
            for i in order
        ]
        texts = [request.query + " " + document for document in request.documents]
        return self._reply(encoding_pb2.RerankResponse, request, texts, results=results)

    def Classify(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, lists=("inputs",))
        texts = [item.text + (" " + item.pair if item.HasField("pair") else "") for item in request.inputs]
        activation = request.activation or encoding_pb2.ACTIVATION_SOFTMAX
        results = []
        for text in texts:
            logits = [random.Random(f"{label}/{text}").gauss(0, 2) for label in LABELS]
            scores = activated(logits, activation)
            best = sorted(range(len(LABELS)), key=lambda i: -logits[i])[: request.top_k or len(LABELS)]
            results.append(
                encoding_pb2.Classification(
                    labels=[encoding_pb2.LabelScore(label=LABELS[i], score=scores[i]) for i in best],
                    num_tokens=len(words_of(text)),
                )
            )
        return self._reply(
            encoding_pb2.ClassifyResponse, request, texts, results=results, activation=activation
        )

    def ClassifyTokens(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, lists=("inputs",))
        results = []
        for text in request.inputs:
            made = encoding_pb2.TokenClassification(num_tokens=len(words_of(text)))
            for word, start, end in words_of(text):
                label = "ENTITY" if word[0].isupper() else "O"
                if label != "O" or request.include_outside:
                    made.spans.add(label=label, score=0.9, text=word, start=start, end=end)
            results.append(made)
        return self._reply(encoding_pb2.ClassifyTokensResponse, request, request.inputs, results=results)

    def FillMask(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, lists=("inputs",))
        results = []
        for position, text in enumerate(request.inputs):
            made = encoding_pb2.MaskFilling(num_tokens=len(words_of(text)))
            for mask in re.finditer(re.escape(MASK), text):
                draw = random.Random(f"{text}/{mask.start()}")
                order = draw.sample(WORDS, len(WORDS))
                probability = {word: 0.5 ** (place + 1) for place, word in enumerate(order)}
                wanted = sorted(request.targets, key=lambda word: -probability.get(word, 0.0))
                chosen = wanted or order[: request.top_k or 5]
                filled = made.masks.add(start=mask.start(), end=mask.end())
                for word in chosen:
                    filled.candidates.add(
                        token_id=self._token_id(word), token=word, probability=probability.get(word, 0.0)
                    )
            if not made.masks:
                problem = f"inputs[{position}]: holds no mask token ({MASK})"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
            results.append(made)
        return self._reply(encoding_pb2.FillMaskResponse, request, request.inputs, results=results)

    def ExtractAnswer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._checked(request, context, texts=("question", "context"))
        answers = []
        for found in re.finditer(r"[^.!?]*[^.!?\s][.!?]?", request.context):
            text = found.group().strip()
            start = found.start() + found.group().index(text)
            score = common_words(request.question, text)
            answers.append(encoding_pb2.Answer(text=text, start=start, end=start + len(text), score=score))
        if request.allow_no_answer:
            answers.append(encoding_pb2.Answer(score=0.1, no_answer=True))
        answers.sort(key=lambda answer: -answer.score)
        return self._reply(
            encoding_pb2.ExtractAnswerResponse, request, [request.question, request.context],
            answers=answers[: request.top_k or 1], windows=1,
        )  # fmt: skip


class FakeInspection(_Service, inspection_pb2_grpc.InspectionServiceServicer):
    """Of a model with two layers of two heads, whose attention falls with the distance."""

    def GetDistribution(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Temperature and top_k are done; a real server's other options are refused, not ignored."""
        self._accept(request, context)
        text = request.messages[-1].content if request.messages else text_of(request.prompt)
        for name in ("template_kwargs", "structured_output"):
            if request.HasField(name):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: a FakeServer does not do it")
        for part in ("sampling", "stopping"):
            for field, _ in getattr(request, part).ListFields():
                if field.name not in ("temperature", "top_k"):
                    problem = f"{part}.{field.name}: a FakeServer does not do it"
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        draw = random.Random(f"{text}/{list(request.output_token_ids)}")
        logits = {word: draw.gauss(0, 2) for word in WORDS}
        show = request.num_candidates or 10
        steps = [self._step("MODEL", logits, show, 0.0)]
        sampling = request.sampling
        if sampling.HasField("temperature") and sampling.temperature == 0:
            best = max(logits, key=lambda word: logits[word])
            removed = 1 - softmax(logits)[best]
            steps.append(self._step("GREEDY", {best: 0.0}, show, removed))
        else:
            if sampling.HasField("temperature"):
                logits = {word: value / sampling.temperature for word, value in logits.items()}
                steps.append(self._step("TEMPERATURE", logits, show, 0.0))
            if 0 < sampling.top_k < len(logits):
                kept = sorted(logits, key=lambda word: -logits[word])[: sampling.top_k]
                removed = 1 - sum(softmax(logits)[word] for word in kept)
                logits = {word: logits[word] for word in kept}
                steps.append(self._step("TOP_K", logits, show, removed))
        return self._reply(inspection_pb2.GetDistributionResponse, request, [text], steps=steps)

    def _step(self, name: str, logits: dict[str, float], show: int, removed: float) -> Any:
        probabilities = softmax(logits)
        order = sorted(probabilities, key=lambda word: -probabilities[word])
        return inspection_pb2.StepDistribution(
            step=f"SAMPLING_STEP_{name}",
            candidates=[
                inspection_pb2.TokenProbability(
                    token_id=self._token_id(word), token=word.encode(), probability=probabilities[word]
                )
                for word in order[:show]
            ],
            num_tokens=len(logits),
            removed_mass=removed,
            entropy=-sum(p * math.log(p) for p in probabilities.values()),
        )

    def GetAttention(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._accept(request, context)
        texts = [text_of(request.prompt), *([request.pair] if request.HasField("pair") else [])]
        words = [(place, *word) for place, text in enumerate(texts) for word in words_of(text)]
        if not words:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt.text: tokenizes to nothing")
        for name, count in (("layers", LAYERS), ("heads", HEADS)):
            for position, index in enumerate(getattr(request, name)):
                if index >= count:
                    problem = f"{name}[{position}]: {index} must be below {count}, the model's {name}"
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        written = [(1, *word) for word in words_of(text_of(request.target))]  # its words look at the prompt's
        queries = written or words
        layers = sorted(set(request.layers)) or range(LAYERS)
        heads: Iterable[int | None] = [None]
        if request.view in _VIEW_OF_HEADS:
            heads = sorted(set(request.heads)) or range(HEADS)
        matrices = []
        for layer in layers:
            for head in heads:
                made = inspection_pb2.AttentionMatrix(layer=layer, head=head)
                for query in range(len(queries)):
                    row = attention_row(query, len(words), layer, head or 0)
                    if request.HasField("top_k"):
                        for key in sorted(range(len(row)), key=lambda k: -row[k])[: request.top_k]:
                            made.links.add(query=query, key=key, weight=row[key])
                    else:
                        made.weights.extend(row)
                matrices.append(made)
        units, rows = (
            [
                inspection_pb2.AttentionUnit(
                    token_ids=[self._token_id(word)], token=word.encode(), start=start, end=end, text=place
                )
                for place, word, start, end in side
            ]
            for side in (words, written)
        )
        return self._reply(
            inspection_pb2.GetAttentionResponse, request, texts, units=units, queries=rows, matrices=matrices,
            num_layers=LAYERS, num_heads=HEADS,
        )  # fmt: skip

    def GetModelCard(self, request: Any, context: grpc.ServicerContext) -> Any:
        """A card with a name and two sizes: there are no tensors to tell of."""
        self._accept(request, context)
        sizes = (("num_layers", LAYERS), ("num_heads", HEADS))
        return inspection_pb2.GetModelCardResponse(
            model=model(), context=request.context or 1024, device="cpu", kernels="fake",
            hyperparameters=[
                inspection_pb2.Hyperparameter(
                    name=name, value=str(value), source=inspection_pb2.HYPERPARAMETER_SOURCE_FAMILY
                )
                for name, value in sizes
            ],
        )  # fmt: skip


def model() -> Any:
    """What a FakeServer says of its model."""
    tasks = [f"TASK_{name}" for name in ("GENERATE", "CHAT", *TASKS)]
    return model_pb2.Model(name="fake", tasks=tasks, embedding_dimensions=DIMENSIONS, labels=LABELS)


def text_of(prompt: Any) -> str:
    """Token ids are words, as numbers."""
    if prompt.WhichOneof("prompt") == "token_ids":
        return " ".join(map(str, prompt.token_ids.ids))
    return str(prompt.text)


def words_of(text: str) -> list[tuple[str, int, int]]:
    """Words and punctuation with their places in code points: the fake model's tokens."""
    return [(found.group(), *found.span()) for found in re.finditer(r"\[MASK\]|\w+|[^\w\s]", text)]


def vector_of(word: str) -> list[float]:
    draw = random.Random(word.casefold())
    return [draw.gauss(0, 1) for _ in range(DIMENSIONS)]


def text_vector(text: str, size: int, normalize: bool) -> list[float]:
    """The mean of the words' vectors."""
    vectors = [vector_of(word) for word, _, _ in words_of(text)] or [[0.0] * DIMENSIONS]
    mean = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)][:size]
    length = math.hypot(*mean) if normalize else 1.0
    return [value / (length or 1.0) for value in mean]


def common_words(one: str, other: str) -> float:
    """Of the words of `one`, the part that `other` has too."""
    first, second = ({w.casefold() for w, _, _ in words_of(text) if w[0].isalnum()} for text in (one, other))
    return len(first & second) / max(1, len(first))


def softmax(logits: dict[str, float]) -> dict[str, float]:
    top = max(logits.values())
    weights = {word: math.exp(value - top) for word, value in logits.items()}
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


def activated(logits: Sequence[float], activation: int) -> list[float]:
    if activation == encoding_pb2.ACTIVATION_IDENTITY:
        return list(logits)
    if activation == encoding_pb2.ACTIVATION_SIGMOID:
        return [1 / (1 + math.exp(-value)) for value in logits]
    return list(softmax(dict(zip(LABELS, logits, strict=True))).values())


def attention_row(query: int, size: int, layer: int, head: int) -> list[float]:
    """Sums to 1: the nearer the more, and every head looks its own way."""
    weights = [1 / (1 + abs(query + head - key)) ** (layer + 1) for key in range(size)]
    return [weight / sum(weights) for weight in weights]
