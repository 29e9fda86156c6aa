"""The noise: the published generator, and a pure function of its key."""

from __future__ import annotations

import numpy as np
import pytest

from salver.model.noise import philox4x32, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected) -> None:
    words = philox4x32(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert tuple(int(word) for word in words[0]) == expected


def test_each_part_of_the_key_counts_and_nothing_else() -> None:
    keys = [(1, 0, 0), (2, 0, 0), (1 << 40, 0, 0), (1, 1, 0), (1, 0, 1)]
    together = uniforms(*(list(part) for part in zip(*keys, strict=True)))
    assert len(set(together)) == len(keys)
    for key, drawn in zip(keys, together, strict=True):
        assert uniforms(*([part] for part in key))[0] == drawn


def test_uniform() -> None:
    drawn = uniforms([7] * 20_000, [0] * 20_000, list(range(20_000)))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square of 19 degrees, p about 4e-6
