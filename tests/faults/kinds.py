"""The kinds of fault: drawn from a seed, and done to a trial's processes, link and disks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .proxy import Proxy
from .services import Service, Start

SERVER = -1
DISK_SIZE = "24m"
# Seconds that a fault which has no end of its own waits before it looks again.
LOOK_S = 0.05


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: which.
        victim: the client that it befalls, or ``SERVER``.
        round: when: once this round has begun; 0: counted from the trial's begin.
        delay: seconds after that.
        seconds: how long it lasts, or how long its victim stays away.
        share: how much of a torn file is left.
        silent: whether the server hears nothing of a cut link.
    """

    kind: str
    victim: int
    round: int
    delay: float
    seconds: float
    share: float
    silent: bool

    def __str__(self) -> str:
        who = "" if self.kind in ("link", "torn") else f" of client {self.victim}"
        when = f"round {self.round} + {self.delay:.2f} s" if self.round else f"{self.delay:.2f} s"
        return (
            f"{self.kind}{'' if self.victim == SERVER else who} at {when} for {self.seconds:.1f} s"
        )


class Stage(Protocol):
    """What a fault can be done to."""

    start: Start
    folder: Path
    server: Service
    clients: list[Service]
    run: Path
    disk: Path
    proxy: Proxy | None

    def client_arguments(self, number: int) -> list[str]:
        """The command of client ``number``."""
        ...

    def expect(self, happened: bool, sentence: str) -> None:
        """Note the sentence as a failure unless ``happened``."""
        ...


# Does the fault; gives the seconds to wait before it goes on.
Script = Callable[[Stage, Fault], Iterator[float]]


def _victim(stage: Stage, fault: Fault) -> Service:
    return stage.server if fault.victim == SERVER else stage.clients[fault.victim]


def _ended_by(number: signal.Signals) -> Script:
    def script(stage: Stage, fault: Fault) -> Iterator[float]:
        victim = _victim(stage, fault)
        before = victim.starts
        victim.hold(fault.seconds)
        victim.send(number)
        while victim.starts == before:
            yield LOOK_S

    return script


def _stopped(stage: Stage, fault: Fault) -> Iterator[float]:
    victim = _victim(stage, fault)
    victim.send(signal.SIGSTOP)
    yield fault.seconds
    victim.send(signal.SIGCONT)


def _link(stage: Stage, fault: Fault) -> Iterator[float]:
    assert stage.proxy is not None
    stage.proxy.cut(server_notices=not fault.silent)
    yield fault.seconds
    stage.proxy.heal()


def _disk(stage: Stage, fault: Fault) -> Iterator[float]:
    ballast = stage.disk / "ballast"
    fill(ballast)
    yield fault.seconds
    ballast.unlink()


def _torn(stage: Stage, fault: Fault) -> Iterator[float]:
    """Kill the server and leave half a file of its newest checkpoint, as a power cut may."""
    server = stage.server
    before = server.starts
    server.hold(fault.seconds)
    server.send(signal.SIGKILL)
    while server.runs:
        yield LOOK_S
    found = sorted(f for f in (stage.run / "checkpoints").glob("*") if f.name.isdigit())
    if found:
        files = sorted(found[-1].iterdir())
        file = files[int(fault.share * 1000) % len(files)]
        os.truncate(file, int(file.stat().st_size * fault.share))
    while server.starts == before:
        yield LOOK_S


def _twin(stage: Stage, fault: Fault) -> Iterator[float]:
    """A second client with the same state directory."""
    number = fault.victim
    twin = Service("twin", lambda: stage.client_arguments(number), stage.folder, 0.0, stage.start)
    while not stage.clients[number].runs:
        yield LOOK_S
    # Only a client that has its directory can keep another out of it.
    yield 1.0
    alone = stage.clients[number].starts
    twin.start()
    ending = None
    try:
        while ending is None and stage.clients[number].starts == alone:
            yield LOOK_S
            ending = twin.watch()
    finally:
        twin.end()
    said = ending.sentence if ending is not None else None
    stage.expect(
        ending is None or (ending.code == 1 and "state directory" in (said or "")),
        f"a second client with the same state directory was not refused: {ending}, {said}",
    )


SCRIPTS: Mapping[str, Script] = {
    "server-kill": _ended_by(signal.SIGKILL),
    "client-kill": _ended_by(signal.SIGKILL),
    "server-term": _ended_by(signal.SIGTERM),
    "client-term": _ended_by(signal.SIGTERM),
    "server-stop": _stopped,
    "client-stop": _stopped,
    "link": _link,
    "server-disk": _disk,
    "client-disk": _disk,
    "torn": _torn,
    "twin": _twin,
}
KINDS = tuple(SCRIPTS)
DISKS = ("server-disk", "client-disk")
# Once a trial: there is one small disk, and two torn checkpoints are one more than is promised for.
_ONCE = (*DISKS, "torn")


def draw(kind: str, rng: random.Random, clients: int, rounds: int, pace: float) -> list[Fault]:
    """A trial's faults: one of ``kind``, and in two of three trials one or two more of any.

    Args:
        kind: the first fault's.
        rng: the trial's.
        clients: how many there are.
        rounds: how many there are.
        pace: seconds that a round takes.
    """
    others = [k for k in KINDS if k not in _ONCE]
    kinds = [kind, *rng.choices(others, k=rng.randrange(3))]
    return sorted(
        (_one(kind, rng, clients, rounds, pace) for kind in kinds), key=lambda fault: fault.round
    )


def _one(kind: str, rng: random.Random, clients: int, rounds: int, pace: float) -> Fault:
    at_start = rng.random() < 0.25
    number = rng.randrange(clients)
    longest = 24.0 if rng.random() < 0.1 and "stop" in kind else 4.0
    return Fault(
        kind=kind,
        victim=number if "client" in kind or kind == "twin" else SERVER,
        round=0 if at_start else rng.randint(1, rounds),
        delay=rng.uniform(0.0, 8.0 if at_start else pace),
        seconds=rng.uniform(0.0 if kind.endswith(("kill", "term")) else 0.5, longest),
        share=rng.random(),
        silent=rng.random() < 0.5,
    )


def fill(ballast: Path) -> None:
    """Write until nothing more fits on that disk."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 14, 1 << 8, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def mount(disk: Path) -> None:
    """A small disk of its own; ``OSError`` where that is not allowed."""
    disk.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "fedkit-faults", str(disk)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.decode().strip())


def unmount(disk: Path) -> None:
    """Take it away, whatever still uses it."""
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True, check=False)


def why_no_disk(folder: Path) -> str | None:
    """Why there can be no small disk here, or None."""
    probe = folder / "probe"
    try:
        mount(probe)
    except OSError as error:
        return str(error)
    unmount(probe)
    return None
