"""How far a simulation is: rounds, client updates a second, and how long it will still take."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedkit.engine.events import Event

# What counts as a client update: its training, in however many exchanges.
TRAINING = "train"
# The time that is left is told from the last minutes: rounds differ, by what is measured in them.
ESTIMATE_S = 300.0


class SimulationBar:
    """A bar in a terminal, and nothing elsewhere; whatever else is printed beside it stays above it."""

    def __init__(self, rounds: int, *, shown: bool = True) -> None:
        """A bar of so many rounds, ``shown`` from the first of them on."""
        self.console = Console(stderr=True, highlight=False)
        self._rounds = rounds
        self._updates = 0
        self._began = time.monotonic()
        # Pieces of clients' work, in this round and in the last one.
        self._works, self._expected = 0, 0
        self._over = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not (shown and self.console.is_terminal),
            speed_estimate_period=ESTIMATE_S,
        )
        self._task = self._bar.add_task("", total=rounds, rate="")

    def take(self, event: Event) -> None:
        """Show one event."""
        if event.event == "round_start":
            if not self._updates:
                self._began = time.monotonic()  # loading the data is over
            self._bar.start()
            self._tell(event, f"{event.n} clients at work")
        elif event.event == "exchange":
            self._tell(event, f"{event.exchange} done")
        elif event.event == "round" and event.name == "seconds":
            self._over, self._works, self._expected = event.round or 0, 0, self._works
            self._bar.update(self._task, completed=self._over)
        elif event.event == "stop":
            self.close()

    def worked(self, kind: str) -> None:
        """A client has done a piece of work of this message type."""
        self._works += 1
        self._updates += kind.partition(".")[0] == TRAINING
        part = min(self._works / self._expected, 1.0) if self._expected else 0.0
        self._bar.update(self._task, completed=self._over + part, rate=f"{self.rate:.1f} updates/s")

    @property
    def rate(self) -> float:
        """Client updates a second since the first round began."""
        return self._updates / max(time.monotonic() - self._began, 1e-9)

    def close(self) -> None:
        """There is nothing more to show."""
        self._bar.stop()

    def _tell(self, event: Event, what: str) -> None:
        self._bar.update(self._task, description=f"round {event.round}/{self._rounds}: {what}")
