"""What an adapter is put on: where a model's weights come from, and in which modules they are."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from .disentangled import DistanceProduct
from .encoder import Encoder
from .experts import ExpertProducts
from .layers import Embedding, Linear, Norm
from .spec import Copy, Either, Source, WeightMap, names_of
from .transformer import Transformer

HEAD = "head"  # of our modules; its matrix may be the embeddings'
SHARED = "shared"  # of an encoder-decoder's, one that holds the matrix and computes nothing
_KINDS = (Linear, Embedding, Norm, ExpertProducts, DistanceProduct)
# The embeddings of an encoder-decoder are one matrix in our model, and modules of their own in theirs.
_SHARED = (
    ("embed", "decoder.embed_tokens.weight", Embedding),
    ("encoder.embed", "encoder.embed_tokens.weight", Embedding),
    (HEAD, "lm_head.weight", Linear),
    (SHARED, "shared.weight", None),
)


@dataclass(frozen=True)
class AdapterBase:
    """The names, shapes and files of a model's weights.

    It holds no weight, and stays right when the native kernel has taken the model's over.

    Attributes:
        sources: by our parameter, what it is read from; parts that share a matrix have a name each.
        kinds: by our module's name, what it is: Linear, Embedding, Norm, ExpertProducts, DistanceProduct.
        stand_ins: by a tensor that is perhaps in no file, since another is the same, that other.
        modules: by our parameter, another source whose names adapters may bear.
        tied: our modules that read the token embeddings' matrix, the embeddings first.
        head_multiplier: of what their head reads, where ours multiplies what it gives.
    """

    checkpoint: Path
    weights: WeightMap
    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, type[nn.Module]]
    dtype: torch.dtype
    stand_ins: Mapping[str, Source] = field(default_factory=dict)
    modules: Mapping[str, Source] = field(default_factory=dict)
    tied: tuple[str, ...] = ("embed",)
    head_multiplier: float = 1.0

    @classmethod
    def of(cls, model: object) -> AdapterBase:
        """Of a model that `load_model` or `load_encoder` made, or that the native kernel made of one."""
        if isinstance(model, AdapterBase):
            return model
        if not isinstance(model, Transformer | Encoder):
            assert isinstance(model, Packed)
            return model.adapter_base
        if model.checkpoint is None:
            raise ValueError("the model was not loaded from a checkpoint")
        weights = model.spec.weights
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        kinds: dict[str, type[nn.Module]] = {}
        for name, module in model.named_modules():
            for known in _KINDS:
                if isinstance(module, known):
                    kinds[name] = known
        sources = weights.expanded(model.spec.num_layers)
        stand_ins: dict[str, Source] = {}
        tied, multiplier = ["embed"], 1.0
        if isinstance(model, Transformer):
            shared: list[_Part] = _shared(sources) if model.encoder is not None else []
            if model.tied_head is not None and not shared:
                # A matrix that two parts share can be adapted in each by itself.
                copies = [name for name, of in weights.duplicates if sources.get("embed.weight") == Copy(of)]
                shared = [(HEAD, copy, sources["embed.weight"], Linear) for copy in copies]
            for ours, name, source, kind in shared:
                sources[f"{ours}.weight"], stand_ins[name] = Copy(name), source
                shapes[f"{ours}.weight"] = shapes["embed.weight"]
                if kind is not None:
                    kinds[ours] = kind
                if kind is Embedding or model.tied_head is not None:
                    tied.append(ours)
            if model.encoder is not None:
                multiplier = model.spec.logit_multiplier
        return cls(
            model.checkpoint, weights, sources, shapes, kinds, model.dtype, stand_ins,
            weights.expanded_modules(model.spec.num_layers),
            tuple(dict.fromkeys(name for name in tied if name in kinds)), multiplier,
        )  # fmt: skip

    @property
    def has_shared(self) -> bool:
        """Whether an encoder-decoder's embeddings are one matrix."""
        return f"{SHARED}.weight" in self.sources

    @functools.cached_property
    def parts(self) -> dict[str, list[str]]:
        """By the name of the checkpoint's tensor, our parameters that read it."""
        found: dict[str, list[str]] = {}
        for ours, source in (*self.sources.items(), *self.modules.items()):
            for name in dict.fromkeys(names_of(source)):
                found.setdefault(name, []).append(ours)
        return found

    def source(self, ours: str, name: str) -> Source:
        """Of our parameter, the one that has a tensor of this name."""
        other = self.modules.get(ours)
        return other if other is not None and name in names_of(other) else self.sources[ours]

    def canonical(self, name: str) -> str:
        """A tensor's name as the weight map has it."""
        name = name.removeprefix(self.weights.optional_prefix)
        for pattern, replacement in self.weights.renames:
            name = re.sub(f"{pattern}$", replacement, name)
        return name


_Part = tuple[str, str, Source, type[nn.Module] | None]


def _shared(sources: Mapping[str, Source]) -> list[_Part]:
    """Our modules whose matrix stands under one of several names: module, its own name, source and kind."""
    found: list[_Part] = []
    for ours, end, kind in _SHARED:
        source = sources.get(f"{ours}.weight", sources["embed.weight"])
        if isinstance(source, Either):
            name = next(name for name in names_of(source) if f".{name}".endswith(f".{end}"))
            found.append((ours, name, source, kind))
        elif ours == HEAD and f"{HEAD}.weight" not in sources:
            found.append((ours, end, source, kind))
    return found


@runtime_checkable
class Packed(Protocol):
    """A model whose weights the native kernel has taken over."""

    @property
    def adapter_base(self) -> AdapterBase: ...
