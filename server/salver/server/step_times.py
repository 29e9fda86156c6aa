"""How long a step takes, learned from the steps that were.

A step of n sequences that also computes p tokens of prompts takes about `base + n * sequence +
p * prefill` seconds. The three are followed by a Kalman filter with a random walk: what the
present load says nothing of (how long would a prompt take, while only decoding goes on?) keeps its
last value. A token is a token, so what one of the two kinds costs says something of the other.
"""

from __future__ import annotations

import math
from itertools import product

ENOUGH_STEPS = 8  # before that, nothing is known: first steps also warm up
DRIFT = 0.001  # variance that a step adds, relative to the size of a parameter
NOISE = 0.2  # standard deviation of a step's duration, relative to it
KINSHIP = 0.8  # correlation of what a decoding sequence and what a prompt token costs
OUTLIER = 4.0  # times what was expected: a longer step counts as that, for the machine stood still
SMOOTHING = 0.05  # of the sizes that the above are relative to

_CORRELATION = ((1.0, 0.0, 0.0), (0.0, 1.0, KINSHIP), (0.0, KINSHIP, 1.0))
_PAIRS = tuple(product(range(3), range(3)))


class StepTimes:
    """Seconds of a step, by its sequences and prompt tokens."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.parameters = [0.0, 0.0, 0.0]  # seconds: base, of a sequence, of a prompt token
        self._covariance = [[0.0] * 3 for _ in range(3)]
        self._seconds = 0.0  # smoothed, of a step
        self._rows = 1.0

    @property
    def known(self) -> bool:
        return self.num_steps >= ENOUGH_STEPS

    @property
    def prefill(self) -> float:
        """Seconds that a prompt token adds."""
        return self.parameters[2]

    def seconds(self, num_sequences: int) -> float:
        """Of a step that decodes so many sequences."""
        return self.parameters[0] + num_sequences * self.parameters[1]

    def observe(self, num_sequences: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step took so long."""
        rows = num_sequences + num_prefill_tokens
        if not self.num_steps:
            self._seconds, self._rows = seconds, rows
            self.parameters = [seconds / 2, seconds / 2 / rows, seconds / 2 / rows]
        self.num_steps += 1
        x = (1.0, num_sequences, num_prefill_tokens)
        expected = sum(value * factor for value, factor in zip(self.parameters, x, strict=True))
        if self.known:
            seconds = min(seconds, OUTLIER * expected)
        self._seconds += SMOOTHING * (seconds - self._seconds)
        self._rows += SMOOTHING * (rows - self._rows)
        covariance = self._drifted()
        # The Kalman filter's update, for one measurement.
        reach = [sum(value * factor for value, factor in zip(row, x, strict=True)) for row in covariance]
        variance = sum(a * b for a, b in zip(reach, x, strict=True)) + (NOISE * seconds) ** 2
        surprise = (seconds - expected) / variance if variance else 0.0
        self.parameters = [max(0.0, p + r * surprise) for p, r in zip(self.parameters, reach, strict=True)]
        for i, j in _PAIRS:
            covariance[i][j] -= reach[i] * reach[j] / variance if variance else 0.0

    def _drifted(self) -> list[list[float]]:
        """The covariance a step later; no parameter is less sure than as to its whole size."""
        of_row = self._seconds / self._rows / 2
        sizes = (self._seconds / 2, of_row, of_row)
        covariance = self._covariance
        drift = DRIFT if self.num_steps > 1 else 1.0
        for i, j in _PAIRS:
            covariance[i][j] += drift * _CORRELATION[i][j] * sizes[i] * sizes[j]
        for i in range(3):
            if covariance[i][i] > sizes[i] ** 2:
                factor = sizes[i] / math.sqrt(covariance[i][i])
                for j in range(3):
                    covariance[i][j] *= factor
                    covariance[j][i] *= factor
        return covariance
