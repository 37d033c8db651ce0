"""A virtual clock: for what has no need to wait."""

from __future__ import annotations


class VirtualClock:
    """Seconds from the start of a run that pass when they are told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """What time it is, in the place of ``time.monotonic``."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: less than no time.
        """
        if not seconds >= 0:
            raise ValueError(f"time can't go back by {-seconds} seconds")
        self.now += seconds

    # In the place of ``time.sleep``.
    sleep = advance
