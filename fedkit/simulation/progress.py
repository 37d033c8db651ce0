"""How far a simulation is: rounds, client updates a second, and how long it will still take."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedkit.cli.logs import Listening
from fedkit.engine.events import Event

# What counts as a client update: its training, in however many exchanges.
TRAINING = "train"


class SimulationProgress:
    """A bar in a terminal, beside what a run tells of itself; elsewhere a line at the end."""

    def __init__(self, told: Listening, rounds: int, *, bar: bool) -> None:
        """Progress of so many rounds; ``told`` shows everything else, and ``bar`` whether there is one."""
        self._told = told
        self._updates = 0
        self._began = time.monotonic()
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.fields[updates]}"),
            BarColumn(),
            TextColumn("round {task.fields[round]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not (bar and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=rounds, updates="", round=f"0/{rounds}")
        self._rounds = rounds
        self._bar.start()

    def take(self, event: Event) -> None:
        """Show one event."""
        self._told.take(event)
        if event.event == "round_start":
            self._bar.update(self._task, round=f"{event.round}/{self._rounds}")
        elif event.event == "round" and event.name == "seconds":
            self._bar.update(self._task, completed=event.round)

    def worked(self, kind: str) -> None:
        """A client has done a piece of work of this message type."""
        if kind.partition(".")[0] == TRAINING:
            self._updates += 1
        self._bar.update(self._task, updates=f"{self.rate:.1f} client updates/s")

    @property
    def rate(self) -> float:
        """Client updates a second since the start."""
        return self._updates / max(time.monotonic() - self._began, 1e-9)

    def close(self) -> None:
        """There is nothing more to show."""
        self._bar.stop()
        self._told.close()
