"""One device: what it takes to work and to send at a time, and whether it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkit.devices import traces
from fedkit.devices.profiles import Profile

# After a week nobody waits for a device any more.
LONGEST_ABSENCE = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Device:
    """One device of a kind; every answer is a function of profile, seed, client and time alone.

    Times (``at``) are seconds from the run's start. The formula is ``Profile``'s.

    Attributes:
        profile: its kind.
        seed: the run's.
        client: its number in the run.
    """

    profile: Profile
    seed: int
    client: int

    def slowdown(self, at: float) -> float:
        """How many times as long as the emulating machine it trains."""
        kind = self.profile
        exponent = kind.spread * traces.normal(self.seed, "device", self.client)
        exponent += kind.jitter * self._normal("compute", at, kind.jitter)
        return kind.slowdown * math.exp(exponent)

    def work_seconds(
        self, samples: int, epochs: float, base_seconds_per_sample: float, at: float
    ) -> float:
        """Seconds to train so many epochs, where the emulating machine takes the base a sample."""
        return samples * epochs * base_seconds_per_sample * self.slowdown(at)

    def up_seconds(self, size: int, at: float) -> float:
        """Seconds that ``size`` bytes take to the server, at the rate with which they begin."""
        return self._transfer(size, self.profile.up_mbit, at)

    def down_seconds(self, size: int, at: float) -> float:
        """Seconds that ``size`` bytes take from the server."""
        return self._transfer(size, self.profile.down_mbit, at)

    def available(self, at: float) -> bool:
        """Whether it is connected and has power."""
        kind = self.profile
        if not traces.within(traces.hour(self.seed, self.client, at), kind.window):
            return False
        return traces.switched_on(self.seed, self.client, at, kind.drop, kind.back)

    def available_from(self, at: float) -> float:
        """The first time from ``at`` on at which it is there, to the minute; infinity after a week."""
        until = at + LONGEST_ABSENCE
        while not self.available(at):
            at = (traces.slot(at) + 1) * traces.SLOT_SECONDS
            if at > until:
                return math.inf
        return at

    def _transfer(self, size: int, mbit: float, at: float) -> float:
        kind = self.profile
        busy = traces.evening(traces.hour(self.seed, self.client, at))
        share = math.exp(kind.line_jitter * self._normal("line", at, kind.line_jitter))
        share *= 1 - kind.evening_dip * busy
        return kind.latency + 8 * size / (1e6 * mbit * share)

    def _normal(self, purpose: str, at: float, scale: float) -> float:
        return traces.normal(self.seed, purpose, self.client, traces.slot(at)) if scale else 0.0
