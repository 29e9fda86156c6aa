"""What EncodingService checks in its requests and writes into its replies, method by method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from salver.model.pooling import normalized
from salver.model.tokenizer.encoding import EncodedText
from salver.server.rpc.convert import add_floats
from salver.server.rpc.errors import Violation, invalid_argument
from salver.server.rpc.served import ServedModel
from salver.server.rpc.validation import Violations
from salver.server.tasks.scores import ranked
from salver.v1 import common_pb2, encoding_pb2

MAX_TARGETS = 1000

_POOLING = {
    encoding_pb2.POOLING_CLS: "cls",
    encoding_pb2.POOLING_MEAN: "mean",
    encoding_pb2.POOLING_MAX: "max",
    encoding_pb2.POOLING_LAST_TOKEN: "lasttoken",
    encoding_pb2.POOLING_WEIGHTED_MEAN: "weightedmean",
}


def check_texts(texts: Sequence[str], field: str, violations: Violations) -> None:
    for position, text in enumerate(texts):
        if not text:
            violations.add(f"{field}[{position}]", "must not be empty")


def check_pair(field: str, model: ServedModel, violations: Violations) -> None:
    """A second text, where the checkpoint reads two."""
    if not model.tokenizer.reads_pairs:
        violations.add(field, f"{model.name!r} reads single texts: its tokenizer puts nothing between two")


def check_count(
    request: Any, field: str, most: int, default: int | None, violations: Violations
) -> int | None:
    """An optional number from 1 to `most`."""
    if not request.HasField(field):
        return default
    value = int(getattr(request, field))
    if not 1 <= value <= most:
        violations.add(field, f"{value} must be between 1 and {most}")
    return value


# --- Embed ---


def check_embed(request: Any, model: ServedModel, violations: Violations) -> tuple[str, ...]:
    """The pooling to use."""
    spec = model.embedding
    pooling = spec.pooling
    if request.pooling:
        if request.pooling not in _POOLING:
            violations.add("pooling", f"{request.pooling} is not a pooling")
        elif spec.dense:
            violations.add("pooling", "cannot be chosen: the checkpoint's dense modules want its own")
        else:
            pooling = (_POOLING[request.pooling],)
    if request.per_token:
        for field in ("dimensions", "normalize", "prompt_name"):
            if request.HasField(field):
                violations.add(field, "does nothing with per_token")
        if request.pooling:
            violations.add("pooling", "does nothing with per_token")
    elif request.HasField("dimensions"):
        most = model.embedding_dimensions
        if spec.dense or not request.pooling:
            check_count(request, "dimensions", most, None, violations)
        else:
            check_count(request, "dimensions", most // len(spec.pooling), None, violations)
    if request.HasField("prompt_name") and request.prompt_name not in {"", *spec.prompts}:
        names = ", ".join(sorted(spec.prompts)) or "none"
        violations.add("prompt_name", f"{request.prompt_name!r} is not one of the checkpoint's ({names})")
    return pooling


def prompt_prefix(request: Any, model: ServedModel) -> str:
    spec = model.embedding
    name = request.prompt_name if request.HasField("prompt_name") else spec.default_prompt_name
    return spec.prompts[name] if name else ""


def embedded(prompt: common_pb2.Prompt, prefix: str, model: ServedModel) -> EncodedText:
    """Of text with its prompt and special tokens, or of token ids as they are."""
    if prompt.WhichOneof("prompt") == "token_ids":
        return EncodedText.of_ids(prompt.token_ids.ids)
    text = prefix + prompt.text
    return model.tokenizer.encode_input(text.lower() if model.embedding.lower_case else text)


def embedding(request: Any, tokens: EncodedText, vector: Any, model: ServedModel) -> encoding_pb2.Embedding:
    normalize = request.normalize if request.HasField("normalize") else model.embedding.normalize
    if request.HasField("dimensions"):
        vector = vector[: request.dimensions]
    if normalize:
        vector = normalized(vector)
    made = encoding_pb2.Embedding(num_tokens=len(tokens), truncated_tokens=tokens.truncated)
    add_floats(made, "values", vector)
    return made


def token_embeddings(tokens: EncodedText, rows: Any, model: ServedModel) -> encoding_pb2.Embedding:
    made = encoding_pb2.Embedding(num_tokens=len(tokens), truncated_tokens=tokens.truncated)
    for token_id, (start, end), row in zip(tokens.token_ids, tokens.offsets, rows, strict=True):
        token = made.tokens.add(
            token_id=token_id, token=model.tokenizer.token_bytes(token_id), start=start, end=end
        )
        add_floats(token, "values", row)
    return made


# --- FillMask ---


def check_targets(request: Any, model: ServedModel, violations: Violations) -> tuple[int, ...]:
    if request.targets and request.HasField("top_k"):
        violations.add("top_k", "does nothing beside targets")
    if len(request.targets) > MAX_TARGETS:
        violations.add("targets", f"must be at most {MAX_TARGETS}")
        return ()
    found = []
    for position, target in enumerate(request.targets):
        token_id = model.tokenizer.token_to_id(target)
        if token_id is None:
            violations.add(f"targets[{position}]", f"{target!r} is not a token of the vocabulary")
        else:
            found.append(token_id)
    return tuple(found)


def mask_places(tokens: EncodedText, field: str, model: ServedModel) -> list[int]:
    """Where the mask tokens are. Raises ApiError where there is none."""
    mask = model.tokenizer.mask_token_id
    places = [i for i, token_id in enumerate(tokens.token_ids) if token_id == mask]
    if mask is None or not places:
        spelled = model.tokenizer.token(mask) if mask is not None else None
        problem = f"holds no mask token ({spelled})" if spelled else "the tokenizer has no mask token"
        if tokens.truncated:
            problem += f" among the tokens that truncation left ({len(tokens)})"
        raise invalid_argument([Violation(field, problem)])
    return places


def filled_masks(
    tokens: EncodedText, masks: list[int], arrays: Any, targets: tuple[int, ...], model: ServedModel
) -> list[encoding_pb2.FilledMask]:
    ids, logprobs, of_targets = arrays
    found = []
    for row, place in enumerate(masks):
        if targets:
            order = ranked(of_targets[row])
            pairs = [(targets[i], float(of_targets[row][i])) for i in order]
        else:
            pairs = [(int(i), float(p)) for i, p in zip(ids[row], logprobs[row], strict=True)]
        start, end = tokens.offsets[place]
        candidates = [
            encoding_pb2.MaskCandidate(
                token_id=token_id, token=model.tokenizer.token(token_id) or "", probability=np.exp(logprob)
            )
            for token_id, logprob in pairs
        ]
        found.append(encoding_pb2.FilledMask(start=start, end=end, candidates=candidates))
    return found
