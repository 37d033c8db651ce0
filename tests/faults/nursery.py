"""Starts fedkit processes quickly: forked from one that has imported torch and Flower already.

Importing them takes seconds of CPU in each process, which is most of what a short trial would cost. The
nursery has one thread and has done nothing but import; what it forks runs fedkit's own ``main`` in a
process, session and signal disposition of its own, and ends as any interpreter does.

    python -m tests.faults.nursery

reads one JSON object a line (arguments, folder, log), answers with the process's id, and tells later how
it ended. It ends with its standard input, and takes along what it has started.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

# The folder from which this package is imported, under whatever name.
_ROOT = Path(__file__).resolve().parents[__name__.count(".") if __name__ != "__main__" else 2]


class Handle:
    """A process of the nursery's, as ``subprocess.Popen`` would show it."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it; None while it lives."""
        return self._nursery.endings.get(self.pid)

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended."""
        with self._nursery.ended:
            self._nursery.ended.wait_for(lambda: self.returncode is not None)
        assert self.returncode is not None
        return self.returncode


class Nursery:
    """The harness's end: may be used by several threads."""

    def __init__(self) -> None:
        """Start it; the first process waits until it has imported everything."""
        self.endings: dict[int, int] = {}
        self.ended = threading.Condition()
        self._asking = threading.Lock()
        self._answers: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: list[str], folder: Path, log: Path) -> Handle:
        """Start ``fedkit ARGUMENTS`` in a folder, with its output in a file."""
        assert self._process.stdin is not None
        wanted = {"arguments": arguments, "folder": str(folder), "log": str(log)}
        with self._asking, self.ended:
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._process.stdin.flush()
            self.ended.wait_for(lambda: self._answers or self._process.poll() is not None)
            return Handle(self, self._answers.pop())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told: dict[str, int] = json.loads(line)
            with self.ended:
                if "code" in told:
                    self.endings[told["pid"]] = told["code"]
                else:
                    self._answers.append(told["pid"])
                self.ended.notify_all()
        self._process.wait()
        with self.ended:  # whoever waits for an answer shall not wait for ever
            self.ended.notify_all()


def _import_everything() -> None:
    import importlib

    from fedkit.cli import client, server
    from fedkit.registry import all_names, load

    for module in ("fedkit.engine.server", "fedkit.engine.driver", "fedkit.engine.facts"):
        importlib.import_module(module)
    for module in ("fedkit.engine.resume", "fedkit.engine.checkpoint", "fedkit.engine.saved"):
        importlib.import_module(module)
    for module in ("fedkit.engine.client", "fedkit.link.grid", "sklearn.datasets", "grpc.aio"):
        importlib.import_module(module)
    # torch imports it with the first optimiser.
    importlib.import_module("torch._dynamo")
    for group in ("strategies", "clients", "models", "datasets", "partitions"):
        for name in all_names(group):
            load(group, name)
    assert client and server


def _serve() -> list[str]:
    """Fork what is asked for; returns in the forked process, with its arguments."""
    children: set[int] = set()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    rest = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 1 << 10)
        _reap(children)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.exit(0)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            wanted: dict[str, Any] = json.loads(line)
            child = os.fork()
            if not child:
                os.close(wake)
                signal.set_wakeup_fd(-1)
                os.close(woken)
                return _become(wanted)
            children.add(child)
            _tell({"pid": child})


def _become(wanted: dict[str, Any]) -> list[str]:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(wanted["folder"])
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, target)
    os.close(nothing)
    os.close(log)
    # Else all would draw the same pauses.
    random.seed()
    arguments: list[str] = wanted["arguments"]
    return arguments


def _reap(children: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        children.discard(pid)
        _tell({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _tell(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    _import_everything()
    sys.argv = ["fedkit", *_serve()]
    from fedkit.cli.app import main

    main()
