"""A federation on Flower's Ray simulation: the same apps, on one machine or on a Ray cluster.

Flower carries the messages and what clients remember; nothing else is shared, so that it works across
machines, too.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedkit.engine.events import Listener
from fedkit.engine.local import Result, runnable
from fedkit.engine.local_clients import local_clients
from fedkit.engine.membership import explain
from fedkit.engine.nodes import Known
from fedkit.engine.plan import Plan, named_here
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import error_reply, is_failure
from fedkit.flower_engine.client import answer
from fedkit.flower_engine.grid import FlowerGrid
from fedkit.flower_engine.server import FlowerRun
from fedkit.flower_engine.told import take_told
from fedkit.registry import allow, listed
from fedkit.rundir import RunDirectory, default_path
from fedkit.settings import Value, as_config
from fedkit.simulation.settings import WorkerSettings, cores

if TYPE_CHECKING:
    from fedkit.engine.facts import ServerView

ENDING_S = 30.0
Worked = Callable[[str], None]


def simulate(
    plan: Plan,
    workers: WorkerSettings,
    listeners: Sequence[Listener] = (),
    worked: Worked = lambda kind: None,
) -> Result:
    """Run a federation on Ray; its numbers are those of every other engine.

    Args:
        plan: a local run's.
        workers: who does the work.
        listeners: take every event, beside the run directory.
        worked: called after each piece of a client's work, with its message type.

    Raises:
        FedkitError: Ray is not installed or does not start, a client's own code failed, ...
        KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    local = plan.local
    assert local is not None
    if importlib.util.find_spec("ray") is None:
        raise FedkitError("--engine ray needs Ray: `pip install 'fedkit[ray]'`.")
    if local.emulate:
        raise UsageError(
            "--emulate goes with fedkit's own workers, which need not wait as long as the devices: leave "
            "it out, or --engine ray."
        )
    rundir = RunDirectory(Path(plan.server.run_dir or default_path(plan.federation.strategy)))
    rundir.write_config({**runnable(plan), **as_config(workers)})
    public_sets = (rundir.path / "public-sets").resolve()
    nodes = [one.node_config(plan, public_sets) for one in local_clients(plan)]
    server = _Server(plan, rundir, listeners, worked)
    server_app = ServerApp()
    server_app.main()(server.run)
    clients = _SimulatedClients(nodes, named_here(plan))
    try:
        run_simulation(
            server_app, clients, len(nodes), backend_config=_resources(plan, workers, len(nodes))
        )
    except RuntimeError as error:
        cause = error.__cause__ or error
        raise FedkitError(f"Ray's simulation ended: {cause.__cause__ or cause}.") from error
    finally:
        server.end()
    return Result(rundir.path, server.summary)


class _Server:
    """The federation's server, on the thread that Flower gives to it."""

    def __init__(
        self, plan: Plan, rundir: RunDirectory, listeners: Sequence[Listener], worked: Worked
    ) -> None:
        self._plan, self._rundir = plan, rundir
        self._listeners, self._worked = listeners, worked
        self._run: _RayRun | None = None
        self._over = threading.Event()
        self.summary: dict[str, Any] = {}

    def run(self, grid: Grid, context: Context) -> None:
        """All rounds, over Flower's grid."""
        self._run = _RayRun(self._plan, grid, self._rundir, self._listeners, self._worked)
        try:
            self.summary = self._run.to_the_end()
        except KeyboardInterrupt:
            return  # which the main thread knows
        finally:
            self._over.set()

    def end(self) -> None:
        """Wait until the summary is written; where Ray has ended first, let the server end, too."""
        if self._run is not None:
            self._run.stop()
            self._over.wait(ENDING_S)


class _SimulatedClients(ClientApp):
    """All clients' app: what a device of a real federation knows of itself, they know by their number."""

    def __init__(self, nodes: Sequence[dict[str, Value]], named: str) -> None:
        super().__init__()
        self._nodes = nodes
        # Code of the user's own, which a worker process may import.
        self._named = named

    def __call__(self, message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        node = self._nodes[number]
        allow(*listed(self._named))
        try:
            return answer(message, context, take_told(message), dict(node))
        except Exception as error:  # whatever somebody's code raises, the run shall say whose
            sentence = f"Client {number} ({node['model']}) failed: {explain(error)}"
            return error_reply(message, f"{sentence}\n{traceback.format_exc()}")


class _RayGrid(FlowerGrid):
    """Flower's grid in a simulation, where the first client that fails ends the run."""

    def __init__(
        self,
        grid: Grid,
        federation: str,
        settings: dict[str, Value],
        names: Callable[[int], str],
        worked: Worked,
    ) -> None:
        # A client's shard is its number, whatever is told here.
        super().__init__(grid, federation, settings, lambda node_id, present: 0)
        self._names, self._worked = names, worked

    def _checked(self, sent: Message, reply: Message) -> Message:
        if reply.has_error():
            sentence, _, trace = (reply.error.reason or "no reason given").partition("\n")
            if not is_failure(reply):
                sentence = f"{self._names(sent.metadata.dst_node_id)} failed: {sentence}"
            failed = FedkitError(sentence)
            failed.add_note(trace)  # shown with --debug
            raise failed
        self._worked(sent.metadata.message_type)
        return super()._checked(sent, reply)


class _RayRun(FlowerRun):
    engine = "ray"
    resumable = False

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        rundir: RunDirectory,
        listeners: Sequence[Listener],
        worked: Worked,
    ) -> None:
        super().__init__(plan, grid, Known(), rundir, listeners)
        self._worked = worked
        self._stopped = False

    def grid(self, view: ServerView) -> Grid:
        """Flower's, with the federation's settings."""
        settings = as_config(self.plan.federation)
        self._grid = _RayGrid(self._flower, self.federation, settings, self.name_of, self._worked)
        if self._stopped:
            self._grid.close()
        return self._grid

    def stop(self) -> None:
        """Give up waiting for clients."""
        self._stopped = True
        if self._grid is not None:
            self._grid.close()

    def name_of(self, node_id: int) -> str:
        """What a client is called in an error."""
        members = self.driver.roster.members if self.driver is not None else {}
        member = members.get(node_id)
        return f"Client {member.client} ({member.model})" if member is not None else "A client"


def _resources(plan: Plan, workers: WorkerSettings, clients: int) -> dict[str, dict[str, Any]]:
    """What Ray has on this machine, and how much of it a client takes; a cluster has what it has."""
    threads = plan.federation.threads
    count = min(workers.workers or max(1, cores() // threads), clients)
    resources = {"num_cpus": threads, "num_gpus": _gpus(plan) / count}
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        quiet["num_cpus"] = count * threads
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return {"init_args": quiet, "client_resources": resources}


def _gpus(plan: Plan) -> int:
    import torch

    assert plan.local is not None
    wanted = plan.local.device == "auto" or plan.local.device.startswith("cuda")
    return torch.cuda.device_count() if wanted else 0
