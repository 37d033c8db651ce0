"""What varies over time, as pure functions of (seed, client, time): asked in any order, always the same.

A client that was killed so goes on with the device that it had. What a chain was drawn to be is remembered
as far as somebody asked, so that each of its slots is drawn once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from statistics import NormalDist

from fedkit.seeds import derive

SLOT_SECONDS = 60.0
_STANDARD = NormalDist()
# As many as a simulation has at most.
_CHAINS_KEPT = 10_000


def uniform(seed: int, purpose: str, client: int, slot: int = -1) -> float:
    """A number drawn evenly from (0, 1)."""
    return (derive(seed, purpose, client, slot) + 0.5) / 2**63


def normal(seed: int, purpose: str, client: int, slot: int = -1) -> float:
    """A standard normal number, within 8 standard deviations."""
    # The nearest float to the largest draw is 1 itself, of which there is no quantile.
    drawn = min(max(uniform(seed, purpose, client, slot), 1e-15), 1 - 1e-15)
    return _STANDARD.inv_cdf(drawn)


def slot(at: float) -> int:
    """The minute that a time (in seconds from the run's start) is in."""
    return int(at // SLOT_SECONDS)


def hour(seed: int, client: int, at: float) -> float:
    """The hour of a device's own day, in [0, 24); the day begins at an hour drawn for the device."""
    return (24 * uniform(seed, "day", client) + at / 3600) % 24


def evening(hour: float) -> float:
    """How busy the line is: 1 at 21 h, 0 at 9 h, a cosine between."""
    return (1 + math.cos(2 * math.pi * (hour - 21) / 24)) / 2


def within(hour: float, window: tuple[float, float]) -> bool:
    """Whether an hour lies in a window, which may run over midnight; (0, 24) holds all."""
    first, last = window
    return first <= hour < last if first < last else hour >= first or hour < last


def switched_on(seed: int, client: int, at: float, drop: float, back: float) -> bool:
    """Whether a Markov chain that starts on, in slots of a minute, is on.

    In each slot one draw u decides for both states: u < drop switches off, u >= 1 - back switches on,
    anything between leaves it.
    """
    return drop == 0 or _chain(seed, client, drop, back).on(slot(at))


class _Chain:
    """A chain as far as it was drawn: the slots in which its state changes, the first one to off."""

    def __init__(self, seed: int, client: int, drop: float, back: float) -> None:
        self._seed, self._client, self._drop, self._back = seed, client, drop, back
        self._changes: list[int] = []
        self._drawn = 0

    def on(self, number: int) -> bool:
        """Whether it is on in a slot."""
        self._draw_until(number)
        return bisect_right(self._changes, number) % 2 == 0

    def _draw_until(self, number: int) -> None:
        for at in range(self._drawn + 1, number + 1):
            drawn = uniform(self._seed, "dropout", self._client, at)
            on = len(self._changes) % 2 == 0
            if drawn < self._drop if on else drawn >= 1 - self._back:
                self._changes.append(at)
        self._drawn = max(self._drawn, number)


_chain = lru_cache(maxsize=_CHAINS_KEPT)(_Chain)
