"""The weight algebra as data (what it computes: parity/test_loading.py)."""

from __future__ import annotations

import pytest

from salver.model.spec import (
    Cat,
    Copy,
    Interleave,
    Mxfp4,
    Optional,
    Source,
    Split,
    Stack,
    Transpose,
    WeightMap,
    in_layer,
    names_of,
)

Q, K = Copy("h.{layer}.q"), Copy("h.{layer}.k")
SOURCES: list[tuple[Source, list[str]]] = [
    (Q, ["h.7.q"]),
    (Transpose(Q), ["h.7.q"]),
    (Cat((K, Transpose(Q)), (1, 2), dim=1), ["h.7.k", "h.7.q"]),
    (Split(Q, (1, 2), 1, dim=1), ["h.7.q"]),
    (Interleave(Q, 2, 3, groups=4), ["h.7.q"]),
    (Mxfp4("h.{layer}.b", "h.{layer}.s"), ["h.7.b", "h.7.s"]),
    (Stack((Q, Split(K, (1, 2), 1, groups=2))), ["h.7.q", "h.7.k"]),
    (Optional(Cat((Q, K), (1, 2)), (3,), 1.0), ["h.7.q", "h.7.k"]),
]


@pytest.mark.parametrize(("source", "names"), SOURCES, ids=lambda value: type(value).__name__)
def test_names_of_a_layer(source: Source, names: list[str]) -> None:
    assert list(names_of(in_layer(source, 7))) == names


@pytest.mark.parametrize("source", [source for source, _ in SOURCES], ids=lambda value: type(value).__name__)
def test_only_the_names_change(source: Source) -> None:
    assert in_layer(source, 7) == eval(repr(source).replace("{layer}", "7"))


def test_every_layer_is_written_out() -> None:
    weights = WeightMap({"embed": Copy("wte"), "layers.{layer}.q": Transpose(Q)})
    assert weights.expanded(2) == {
        "embed": Copy("wte"),
        "layers.0.q": Transpose(Copy("h.0.q")),
        "layers.1.q": Transpose(Copy("h.1.q")),
    }


def test_some_layers_only() -> None:
    weights = WeightMap({"layers.{layer}.q": Q, "layers.{layer}.k": K}, layers={"layers.{layer}.k": (1,)})
    assert list(weights.expanded(2)) == ["layers.0.q", "layers.1.q", "layers.1.k"]
