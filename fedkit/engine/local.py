"""A whole federation on this machine: one server process and its clients, started, watched, cleaned up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

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
from fedkit.engine.events import Event
from fedkit.engine.local_clients import LocalClient, local_clients
from fedkit.engine.plan import Plan, check_shards, make_plan, named_here
from fedkit.errors import FedkitError, UsageError
from fedkit.rundir import default_path, read_events
from fedkit.settings import as_config, build, merge, refuse_unknown

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        directory: the run directory.
        summary: ``summary.json``.
    """

    directory: Path
    summary: dict[str, Any]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``."""
        return read_events(self.directory)

    @property
    def metrics(self) -> Any:
        """The measurements as a pandas data frame, one row each.

        Raises:
            FedkitError: pandas is not installed; ``events`` needs none.
        """
        try:
            import pandas
        except ImportError:
            raise FedkitError(
                "Result.metrics needs pandas: `pip install fedkit[pandas]`, or use Result.events."
            ) from None
        return pandas.DataFrame([e for e in self.events if e["event"] == "metric"])


class Federation:
    """A local federation of real processes; the command line's engine and settings.

    >>> Federation(strategy="ktpfl", clients=4, rounds=10).run()  # doctest: +SKIP
    """

    def __init__(self, **settings: bool | int | float | str) -> None:
        """Settings as `fedkit run` takes them, in Python's spelling: ``num_shards=8``.

        Raises:
            UsageError: an unknown name or a value out of range.
        """
        self.plan = make_plan(settings, local=True)

    def run(self, *listeners: Listener) -> Result:
        """Run it to the end; ``listeners`` take every event.

        Raises:
            FedkitError: a process failed; the sentence names it and its first error.
        """
        return run_local(self.plan, list(listeners))

    def simulate(self, *listeners: Listener, **workers: bool | int | str) -> Result:
        """Run it without a network, as `fedkit simulate` does; the numbers are those of ``run``.

        Args:
            listeners: take every event.
            workers: that command's own settings, in Python's spelling: ``workers=8, batched=16``.

        Raises:
            UsageError: an unknown name or a value out of range.
            FedkitError: a client's own code failed (its traceback is in the notes), a worker died, ...
        """
        import torch

        from fedkit.simulation.engines import engine
        from fedkit.simulation.settings import WorkerSettings

        own = merge(workers)
        refuse_unknown(own, [WorkerSettings])
        settings = build(WorkerSettings, own)
        # The server's half works in this process, with --threads; whoever called may want more.
        threads = torch.get_num_threads()
        try:
            return engine(settings.engine)(self.plan, settings, listeners)
        finally:
            torch.set_num_threads(threads)


def run_local(plan: Plan, listeners: list[Listener]) -> Result:
    """Start a server and its clients, follow them, and leave no process behind."""
    assert plan.local is not None
    directory = Path(plan.server.run_dir or default_path(plan.federation.strategy))
    if (directory / "metrics.jsonl").exists():
        raise UsageError(f"{directory} holds a run already: choose another --run-dir.")
    check_shards(plan)
    clients = local_clients(plan)
    make_folder(directory / "logs")
    with living_children() as children:
        children.append(_start_server(plan, directory))
        address = wait_for_address(directory, children)
        # The server's own config.toml knows nothing of the clients; this one runs it all again.
        write_whole(directory / "config.toml", [tomli_w.dumps(runnable(plan)).encode()])
        for one in clients:
            children.append(_start_client(plan, directory, address, one))
        _follow(directory, children, listeners)
    return Result(directory, json.loads((directory / "summary.json").read_text()))


def runnable(plan: Plan) -> dict[str, Any]:
    """The settings with which the same is run again, elsewhere."""
    values = plan.values()
    for name in ("run-dir", "listen"):
        values.pop(name)
    return {name: value for name, value in values.items() if value != ""}


def _environment(plan: Plan) -> dict[str, str]:
    # Several processes share the cores; the numbers hang on this too.
    return {"OMP_NUM_THREADS": str(plan.federation.threads)}


def _start_server(plan: Plan, directory: Path) -> Child:
    config = directory / "logs" / "server.toml"
    values = {k: v for k, v in plan.values().items() if v != ""}
    local = as_config(plan.local)
    for name in [*local, "run-dir"]:
        values.pop(name, None)
    values["allow"] = named_here(plan)
    if plan.server.listen == type(plan.server)().listen:
        values["listen"] = "127.0.0.1:0"  # several runs side by side
    config.write_text(tomli_w.dumps(values))
    arguments = ["--quiet", "server", "--config", str(config), "--run-dir", str(directory)]
    return start("the server", directory / "logs" / "server.log", arguments, _environment(plan))


def _start_client(plan: Plan, directory: Path, address: str, one: LocalClient) -> Child:
    assert plan.local is not None
    arguments = [
        "client",
        *("--model", one.model),
        *("--data-shard", str(one.number)),
        *("--server", address),
        *("--device", plan.local.device),
        *("--state-dir", str(directory / "clients" / f"client-{one.number}")),
    ]
    for option, value in (
        ("--width", one.width),
        ("--depth", one.depth),
        ("--time-budget", one.time_budget),
        ("--corrupt", one.corrupt),
        ("--emulate", one.emulate),
    ):
        if value:
            arguments += [option, value]
    if plan.data.data_root:
        arguments += ["--data-root", plan.data.data_root]
    if named := named_here(plan):
        arguments += ["--allow", named]
    if plan.data.allow_checksum_mismatch:
        arguments += ["--allow-checksum-mismatch"]
    log = directory / "logs" / f"client-{one.number}.log"
    return start(f"client {one.number} ({one.model})", log, arguments, _environment(plan))


def _follow(directory: Path, children: list[Child], listeners: list[Listener]) -> None:
    server = children[0].process
    with (directory / "metrics.jsonl").open(encoding="utf-8") as lines:
        rest = ""
        while True:
            ended = server.poll() is not None
            rest = _pass_on(rest + lines.read(), listeners)
            if ended:
                break
            raise_if_failed(children)
            time.sleep(POLL_S)
    wait_for_the_end(children)


def _pass_on(text: str, listeners: list[Listener]) -> str:
    *whole, rest = text.split("\n")
    for line in whole:
        record = json.loads(line)
        record.pop("time")
        for listener in listeners:
            listener(Event(**record))
    return rest
