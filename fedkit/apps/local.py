"""A Flower App's server and clients on this machine, as real processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tomli_w

from fedkit.apps.bundle import FlowerApp
from fedkit.durable import make_folder, write_whole
from fedkit.engine.children import (
    POLL_S,
    Child,
    living_children,
    raise_if_failed,
    start,
    wait_for_address,
    wait_for_the_end,
)
from fedkit.errors import UsageError


@dataclass(frozen=True)
class LocalApp:
    """What was typed at `fedkit run --app`.

    Attributes:
        app: the app in its folder.
        run_config: the texts of ``--run-config``.
        clients: how many; each is told its ``partition-id`` and their number.
        min_clients: so many must be connected before the ServerApp is called.
        listen: where the server listens, on this machine.
        run_dir: where everything is written.
    """

    app: FlowerApp
    run_config: Sequence[str]
    clients: int
    min_clients: int
    listen: str
    run_dir: Path

    def values(self) -> dict[str, Any]:
        """The settings with which `fedkit run --config` runs the same again."""
        return {
            "app": str(self.app.folder),
            "run-config": str(self.run_dir / "run-config.toml"),
            "clients": self.clients,
            "min-clients": self.min_clients,
        }


def run_app(plan: LocalApp, *, show: bool) -> dict[str, Any]:
    """Run it to the end, and leave no process behind; gives the summary.

    Args:
        plan: what to run.
        show: pass what the server prints on to stdout.

    Raises:
        FedkitError: a process failed; the sentence names it and its first error.
    """
    directory = plan.run_dir
    if (directory / "metrics.jsonl").exists():
        raise UsageError(f"{directory} holds a run already: choose another --run-dir.")
    make_folder(directory / "logs")
    with living_children() as children:
        children.append(_start_server(plan, quiet=not show))
        with children[0].log.open(encoding="utf-8", errors="replace") as printed:
            address = wait_for_address(directory, children)
            write_whole(directory / "config.toml", [tomli_w.dumps(plan.values()).encode()])
            children += [_start_client(plan, address, number) for number in range(plan.clients)]
            while children[0].process.poll() is None:
                _pass_on(printed, show)
                raise_if_failed(children)
                time.sleep(POLL_S)
            _pass_on(printed, show)
        wait_for_the_end(children)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def _start_server(plan: LocalApp, *, quiet: bool) -> Child:
    arguments = [
        *(["--quiet"] if quiet else []),
        "server",
        *("--app", str(plan.app.folder)),
        *("--min-clients", str(plan.min_clients)),
        *("--listen", plan.listen),
        *("--run-dir", str(plan.run_dir)),
        *(word for text in plan.run_config for word in ("--run-config", text)),
    ]
    return start("the server", plan.run_dir / "logs" / "server.log", arguments, _environment())


def _start_client(plan: LocalApp, address: str, number: int) -> Child:
    arguments = [
        "client",
        *("--app", str(plan.app.folder)),
        *("--server", address),
        *("--node-config", f"partition-id={number} num-partitions={plan.clients}"),
        *("--state-dir", str(plan.run_dir / "clients" / f"client-{number}")),
    ]
    log = plan.run_dir / "logs" / f"client-{number}.log"
    return start(f"client {number}", log, arguments, _environment())


def _environment() -> dict[str, str]:
    # Several processes share the cores, unless their owner knows better.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}


def _pass_on(printed: IO[str], show: bool) -> None:
    for line in printed:
        # The server's last word is told with its name when it has ended.
        if show and not line.startswith("Error: "):
            sys.stdout.write(line)
            sys.stdout.flush()
