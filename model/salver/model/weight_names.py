"""From a family's names to a `WeightMap`: which tensors a spec has, and where each comes from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from .spec import (
    LAYER,
    BucketPositions,
    Cat,
    Copy,
    Interleave,
    LatentAttention,
    LearnedPositions,
    ModelSpec,
    NormSpec,
    Source,
    Split,
    Stack,
    Transpose,
    WeightMap,
)

EXPERT = "{expert}"  # stands for the number of an expert in a name

# Where a part's tensors come from: the checkpoint's name for the part; several names, one below the
# other (q, k, v; gate, up); or a function of "weight" or "bias".
Place = str | tuple[str, ...] | Callable[[str], Source]
Names = Mapping[str, Place]

_WEIGHT = ("weight",)


def with_weights(
    spec: ModelSpec,
    names: Names,
    *,
    ignored: tuple[str, ...] = (),
    optional_prefix: str = "",
    renames: tuple[tuple[str, str], ...] = (),
) -> ModelSpec:
    """The spec with the map of all its tensors; `names` as in `weight_map`, the rest as in `WeightMap`."""
    weights = weight_map(spec, names)
    weights = replace(weights, ignored=ignored, optional_prefix=optional_prefix, renames=renames)
    return replace(spec, weights=weights)


def weight_map(spec: ModelSpec, names: Names) -> WeightMap:
    """The map of all tensors that the spec has, by the family's name for each part.

    Names of parts are those of the stack's modules, without `layers.{layer}.`; a checkpoint name
    holds `{layer}` where the part is in a layer, and `{expert}` where it is in an expert.
    """
    tensors: dict[str, Source] = {}
    layers: dict[str, tuple[int, ...]] = {}
    for part, kinds, where in _parts(spec):
        for kind in kinds:
            ours = f"{part}.{kind}" if where is None else f"layers.{LAYER}.{part}.{kind}"
            tensors[ours] = _source(spec, part, names[part], kind)
            if where is not None and len(where) < spec.num_layers:
                layers[ours] = where
    head, embed = names.get("head"), names.get("embed")
    duplicates: tuple[tuple[str, str], ...] = ()
    if spec.tied_head and isinstance(head, str) and isinstance(embed, str):
        duplicates = ((f"{head}.weight", f"{embed}.weight"),)
    return WeightMap(tensors, duplicates=duplicates, layers=layers)


def _parts(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...] | None]]:
    """Every part of the stack, its tensors, and the layers in which it is (None: it is in no layer)."""
    everywhere = tuple(range(spec.num_layers))
    yield "embed", _WEIGHT, None
    if spec.embedding_size not in (None, spec.hidden_size):
        yield "embed_in", _WEIGHT, None
        yield "embed_out", _WEIGHT, None
    if spec.embedding_norm is not None:
        yield "embedding_norm", _norm(spec.embedding_norm), None
    if isinstance(spec.positions, LearnedPositions):
        yield "positions", _WEIGHT, None
    if isinstance(spec.positions, BucketPositions):
        yield "buckets", _WEIGHT, everywhere if spec.positions.own else None
    if spec.norm_place != "output":
        yield "attention_norm", _norm(spec.norm), everywhere
        if not spec.shared_norm:
            yield "mlp_norm", _norm(spec.norm), everywhere
    if spec.norm_place in ("output", "sandwich"):
        yield "attention_out_norm", _norm(spec.norm), everywhere
        yield "mlp_out_norm", _norm(spec.norm), everywhere
    if spec.latent is None:
        yield "qkv", _linear(spec.qkv_bias), everywhere
    else:
        yield from _latent_parts(spec, spec.latent, everywhere)
    if spec.head_norm is not None:
        yield "query_norm", _norm(spec.head_norm.norm), everywhere
        yield "key_norm", _norm(spec.head_norm.norm), everywhere
    if spec.sinks:
        yield "sinks", _WEIGHT, everywhere
    yield "attention_out", _linear(spec.attention_out_bias), everywhere
    if spec.encoder is not None:
        yield "cross_norm", _norm(spec.norm), everywhere
        for part in ("query", "key_value", "out"):
            yield f"cross.{part}", _linear(spec.cross_bias), everywhere
    yield from _mlp_parts(spec, everywhere)
    if spec.final_norm:
        yield "final_norm", _norm(spec.norm), None
    if spec.logit_bias:
        yield "logit_bias", _WEIGHT, None
    if not spec.tied_head:
        yield "head", _linear(spec.head_bias), None


def _latent_parts(
    spec: ModelSpec, latent: LatentAttention, everywhere: tuple[int, ...]
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    if latent.query_rank:
        yield "latent.query_down", _linear(spec.qkv_bias), everywhere
        yield "latent.query_norm", _norm(latent.norm), everywhere
    yield "latent.query_up", _WEIGHT, everywhere
    yield "latent.down", _linear(spec.qkv_bias), everywhere
    yield "latent.norm", _norm(latent.norm), everywhere
    yield "latent.up", _WEIGHT, everywhere


def _mlp_parts(
    spec: ModelSpec, everywhere: tuple[int, ...]
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    mixed = spec.expert_layers if spec.experts is not None else ()
    dense = tuple(layer for layer in everywhere if layer not in mixed)
    if dense:
        yield "up", _linear(spec.mlp_bias), dense
        yield "down", _linear(spec.mlp_bias), dense
    experts = spec.experts
    if experts is None or not mixed:
        return
    for part in ("router", "up", "down"):
        yield f"experts.{part}", _linear(experts.bias), mixed
    if experts.correction:
        yield "experts.correction", _WEIGHT, mixed
    if experts.shared_intermediate_size:
        yield "experts.shared_up", _WEIGHT, mixed
        yield "experts.shared_down", _WEIGHT, mixed
    if experts.shared_gate:
        yield "experts.shared_gate", _WEIGHT, mixed


def _linear(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else _WEIGHT


def _norm(norm: NormSpec) -> tuple[str, ...]:
    return _linear(norm.has_bias) if norm.weight else ()


def _source(spec: ModelSpec, part: str, place: Place, kind: str) -> Source:
    if not isinstance(place, str | tuple):
        return place(kind)
    first = place if isinstance(place, str) else place[0]
    if EXPERT in first and spec.experts is not None:
        return Stack(tuple(_copies(spec, part, place, kind, str(e)) for e in range(spec.experts.count)))
    return _copies(spec, part, place, kind, "")


def _copies(spec: ModelSpec, part: str, place: str | tuple[str, ...], kind: str, expert: str) -> Source:
    if isinstance(place, str):
        return Copy(f"{place}.{kind}".replace(EXPERT, expert))
    copies = tuple(Copy(f"{name}.{kind}".replace(EXPERT, expert)) for name in place)
    sizes = {"qkv": spec.qkv_sizes, "cross.key_value": spec.qkv_sizes[1:]}
    return Cat(copies, sizes.get(part, (_inner_size(spec, part),) * 2))


def _inner_size(spec: ModelSpec, part: str) -> int:
    if spec.experts is None or part == "up":
        return spec.intermediate_size
    if part == "experts.up":
        return spec.experts.intermediate_size
    return spec.experts.shared_intermediate_size


# ---- other ways in which checkpoints store a part ----


def transposed(name: str) -> Callable[[str], Source]:
    """A product stored [in, out] (GPT-2's Conv1D)."""
    return lambda kind: Transpose(Copy(f"{name}.{kind}")) if kind == "weight" else Copy(f"{name}.{kind}")


def grouped_qkv(
    name: str, sizes: tuple[int, int, int], groups: int, order: tuple[int, int, int] = (0, 1, 2)
) -> Callable[[str], Source]:
    """q, k and v of one tensor whose rows are `groups` runs of three pieces, as long as `sizes`.

    `order`: which of the pieces are q, k and v.
    """

    def source(kind: str) -> Source:
        whole = Copy(f"{name}.{kind}")
        parts = tuple(Split(whole, sizes, index, groups=groups) for index in order)
        return Cat(parts, tuple(sizes[index] * groups for index in order))

    return source


def unpaired(source: Source, heads: int, head_dim: int, rotary_dim: int) -> Source:
    """Rows of so many heads whose rotary dimensions are stored in pairs, each pair's second value moved to
    the second half: there the rotation expects it."""
    return Interleave(source, rotary_dim // 2, 2, heads, tail=head_dim - rotary_dim)


def paired_qkv(
    names: tuple[str, str, str], heads: int, kv_heads: int, head_dim: int, rotary_dim: int
) -> Callable[[str], Source]:
    """q, k and v of three tensors, q and k with rotary dimensions in pairs (GPT-J, Cohere, GLM)."""

    def source(kind: str) -> Source:
        query, key, value = (Copy(f"{name}.{kind}") for name in names)
        return Cat(
            (
                unpaired(query, heads, head_dim, rotary_dim),
                unpaired(key, kv_heads, head_dim, rotary_dim),
                value,
            ),
            (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim),
        )

    return source
