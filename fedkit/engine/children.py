"""The processes of a run on one machine: started, watched, and never left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedkit.errors import FedkitError, error_of

POLL_S = 0.05
START_WAIT_S = 60.0
END_WAIT_S = 15.0
KILL_WAIT_S = 5.0


@dataclass
class Child:
    """One of them: what people call it, its output, and the process; the server is the first."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def living_children() -> Iterator[list[Child]]:
    """A list for them; whichever way it is left, they are ended."""
    children: list[Child] = []
    try:
        yield children
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + KILL_WAIT_S
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            if child.process.stdin is not None:
                child.process.stdin.close()


def start(name: str, log: Path, arguments: list[str], environment: Mapping[str, str]) -> Child:
    """Start a fedkit command, with ``environment`` on top of this process's own."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            # -P: a folder of the user's own called `strategies` or `clients` must not come first.
            [sys.executable, "-P", "-m", "fedkit", *_debugging(), *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FEDKIT_EXIT_WITH_PARENT": "1", **environment},
            # Ctrl-C goes to this process alone, which then ends the others in order.
            start_new_session=True,
        )
    return Child(name, log, process)


def wait_for_address(directory: Path, children: list[Child]) -> str:
    """Where the server listens, once it does; ``FedkitError`` if it does not come up."""
    deadline = time.monotonic() + START_WAIT_S
    file = directory / "address"
    while not file.exists():
        raise_if_failed(children)
        if time.monotonic() > deadline:
            raise FedkitError(f"The server did not come up in {START_WAIT_S:.0f} seconds.")
        time.sleep(POLL_S)
    return file.read_text()


def wait_for_the_end(children: list[Child]) -> None:
    """The server has ended: so will its clients, or they are ended with the others."""
    raise_if_failed(children)
    deadline = time.monotonic() + END_WAIT_S
    for child in children[1:]:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    raise_if_failed(children)


def raise_if_failed(children: list[Child]) -> None:
    """``FedkitError`` with the first error of the first that failed, if one did."""
    failed = [child for child in children if child.process.poll() not in (None, 0)]
    if not failed:
        return
    first = min(failed, key=lambda child: child.log.stat().st_mtime_ns)
    if _first_error(first, 1).startswith("The server ended"):
        # Clients fail with their server, sometimes before it is gone itself.
        first = children[0]
        try:
            first.process.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            first = failed[0]
    status = first.process.returncode
    raise error_of(
        2 if status == 2 else 1,
        f"{first.name[0].upper()}{first.name[1:]} failed: {_first_error(first, status)} "
        f"(its output is in {first.log})",
    )


def _debugging() -> list[str]:
    return ["--debug"] if logging.getLogger("fedkit").level == logging.DEBUG else []


def _first_error(child: Child, status: int) -> str:
    for line in child.log.read_text(errors="replace").splitlines():
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
    if status < 0:
        return f"it was killed by {signal.Signals(-status).name}."
    return f"it ended with exit code {status}."
