"""Sliding windows as configs describe them: one for all layers, or by the kind of each layer."""

from __future__ import annotations

from collections.abc import Callable

from ..config_reader import ConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = tuple[int | None, ...]


def everywhere(window: int | None) -> Callable[[int, int], Windows]:
    """The same window in all layers."""
    return lambda num_layers, context: _useful((window,) * num_layers, context)


def in_sliding_layers(
    c: ConfigReader, window: int | None, usual: Callable[[int], bool]
) -> Callable[[int, int], Windows]:
    """A window in the layers that `layer_types` calls sliding, or else in those whose number is `usual`."""

    def windows(num_layers: int, context: int) -> Windows:
        kinds = layer_kinds(c, num_layers, usual)
        if window is None and SLIDING in kinds:
            raise c.error("sliding_window", "is missing, but some of layer_types are sliding")
        return _useful(tuple(window if kind == SLIDING else None for kind in kinds), context)

    return windows


def layer_kinds(c: ConfigReader, num_layers: int, usual: Callable[[int], bool]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer: `layer_types`, or where `usual` says so."""
    kinds: tuple[str, ...] | None = c.listed("layer_types", (FULL, SLIDING), num_layers)
    return kinds or tuple(SLIDING if usual(layer) else FULL for layer in range(num_layers))


def _useful(windows: Windows, context: int) -> Windows:
    """() where no window is shorter than the context."""
    windows = tuple(None if window is None or window >= context else window for window in windows)
    return windows if any(window is not None for window in windows) else ()
