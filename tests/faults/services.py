"""Processes as a service manager keeps them: what ends is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FEDKIT = [sys.executable, "-P", "-m", "fedkit"]


class Started(Protocol):
    """A process, as ``subprocess.Popen`` shows it."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, once that was asked for."""
        ...

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        ...

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self) -> int:
        """Wait until it has ended."""
        ...


# Starts ``fedkit ARGUMENTS`` in a folder, with its output in a file.
Start = Callable[[list[str], Path, Path], Started]


def start_afresh(arguments: list[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A new interpreter."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*FEDKIT, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        code: its exit code, or the signal's negative number.
        ours: whether the trial had sent it a signal.
        log: its output.
    """

    code: int
    ours: bool
    log: Path

    @property
    def sentence(self) -> str | None:
        """The sentence with which it failed, if there is one."""
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("Error: "):
                return line.removeprefix("Error: ")
        return None


class Service:
    """One command that is started again whenever it ends, until it is retired."""

    def __init__(
        self,
        name: str,
        arguments: Callable[[], list[str]],
        folder: Path,
        pause: float,
        start: Start,
    ) -> None:
        """A service that does not run yet.

        Args:
            name: names its logs.
            arguments: fedkit's, asked for at each start.
            folder: where it runs, and where its logs go.
            pause: seconds before it is started again.
            start: starts a process.
        """
        self.name = name
        self.endings: list[Ending] = []
        self.starts = 0
        self.log = folder / f"{name}.0.log"
        self._arguments = arguments
        self._folder = folder
        self._pause = pause
        self._start = start
        self._process: Started | None = None
        self._start_at: float | None = None
        self._retired = False
        self._ours = False

    @property
    def runs(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it now."""
        self.starts += 1
        self.log = self._folder / f"{self.name}.{self.starts}.log"
        self._ours, self._start_at = False, None
        self._process = self._start(self._arguments(), self._folder, self.log)

    def send(self, number: signal.Signals) -> None:
        """Send its process a signal, if it lives."""
        if self._process is not None and self._process.poll() is None:
            self._ours = self._ours or number in (signal.SIGKILL, signal.SIGTERM)
            self._process.send_signal(number)

    def hold(self, seconds: float) -> None:
        """Start it again after so long at the earliest, if it ends now."""
        self._start_at = time.monotonic() + seconds

    def watch(self) -> Ending | None:
        """Notice that it ended, and start it again when its pause is over."""
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            assert code is not None
            ending = Ending(code, self._ours, self.log)
            self.endings.append(ending)
            self._process = None
            self._start_at = self._start_at or time.monotonic() + self._pause
            return ending
        due = self._start_at is not None and time.monotonic() >= self._start_at
        if self._process is None and due and not self._retired:
            self.start()
        return None

    def retire(self) -> None:
        """Do not start it again."""
        self._retired = True

    def end(self) -> None:
        """Kill it, and never start it again."""
        self.retire()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()


def left_over(folder: Path) -> list[int]:
    """Ids of the living processes that belong to the trial in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # It may end, or be somebody else's.
            with suppress(OSError):
                if (entry / "cwd").readlink() == folder:
                    found.append(int(entry.name))
    return found
