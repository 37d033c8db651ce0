"""The server of a Flower App: listen, wait for clients, call its ServerApp, write down what travelled."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import tomli_w

from fedkit.apps.bundle import FlowerApp
from fedkit.apps.membership import run_id_of
from fedkit.engine.door import Door
from fedkit.engine.events import Event, Listener
from fedkit.engine.lobby import compare_versions
from fedkit.errors import FedkitError, where_raised
from fedkit.link.node import Refusal
from fedkit.rundir import SCHEMA, RunDirectory
from fedkit.security.settings import ServerSecurity
from fedkit.settings import ServerSettings, Value

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp

    from fedkit.apps.grid import AppGrid

_log = logging.getLogger(__name__)
POLL_S = 0.05


@dataclass(frozen=True)
class AppPlan:
    """What was typed at `fedkit server --app`.

    Attributes:
        app: the app in its folder.
        run_config: its configuration, overrides included; the clients' contexts hold it, too.
        min_clients: so many must be connected before the ServerApp is called.
        server: where to listen and write; ``run_dir`` is given.
        security: TLS and tokens.
    """

    app: FlowerApp
    run_config: Mapping[str, Value]
    min_clients: int
    server: ServerSettings
    security: ServerSecurity

    def values(self) -> dict[str, Value]:
        """The settings as a file; the run config stands in a file of its own."""
        return {
            "app": str(self.app.folder),
            "run-config": str(Path(self.server.run_dir) / "run-config.toml"),
            "min-clients": self.min_clients,
            "listen": self.server.listen,
        }


def serve_app(
    plan: AppPlan, server_app: ServerApp, show: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Run the app's server half; returns the run directory and the summary.

    Args:
        plan: what to run.
        server_app: the app's ``ServerApp``.
        show: takes what people may want to know meanwhile, a line at a time.

    Raises:
        FedkitError: the port is in use, the ServerApp failed, ...
        KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    run = _AppRun(plan, show)
    address = run.door.link.listen(plan.server.listen)
    with run.door.until_over() as over:
        summary = run.to_the_end(server_app, address)
        over(f"The run of {plan.app} is over.")
    return Path(plan.server.run_dir), summary


class _AppRun:
    """One run of an app; the link's thread and those of the app tell what happens."""

    def __init__(self, plan: AppPlan, show: Callable[[str], None]) -> None:
        self._plan = plan
        self._show = show
        self._federation = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._joined: dict[int, str] = {}
        self._record: Listener | None = None
        self._over = False
        self._unwritten: list[Event] = []
        self._grid: AppGrid | None = None
        self._started = time.monotonic()
        self.door = Door(
            plan.server,
            plan.security,
            self._greet,
            self._part,
            federation=self._federation,
            about={"app": str(plan.app)},
        )

    def to_the_end(self, server_app: ServerApp, address: str) -> dict[str, Any]:
        """Call the ServerApp; whichever way it ends, the run directory says how."""
        plan = self._plan
        rundir = RunDirectory(Path(plan.server.run_dir))
        status, reason = "failed", "the server's own code failed"
        try:
            rundir.write_config(plan.values())
            rundir.write_text("run-config.toml", tomli_w.dumps(plan.run_config))
            with self._lock:
                self._record = rundir.record
                # Who came between the port's opening and now.
                for event in self._unwritten:
                    rundir.record(event)
            self._emit(Event("listen", name=address))
            rundir.write_text("address", address)
            self.door.link.spool_in(rundir.path)
            self._wait(address)
            self._emit(Event("start", name=str(plan.app)))
            self._call(server_app)
            status, reason = "completed", "the ServerApp returned"
        except KeyboardInterrupt:
            status, reason = "stopped", "it was asked to stop"
            raise
        except FedkitError as error:
            reason = str(error)
            raise
        finally:
            summary = self._summary(status, reason)
            try:
                rundir.write("summary.json", summary)
                self._emit(Event("stop", name=status, value=reason))
            finally:
                with self._lock:
                    self._record, self._over = None, True
                rundir.close()
        return summary

    def _wait(self, address: str) -> None:
        wanted, link = self._plan.min_clients, self.door.link
        if len(link.node_ids()) < wanted:
            many = "s" if wanted > 1 else ""
            self._show(f"{self._plan.app}: waiting for {wanted} client{many} at {address}")
        while len(link.node_ids()) < wanted:
            time.sleep(POLL_S)

    def _call(self, server_app: ServerApp) -> None:
        from fedkit.apps.grid import AppGrid
        from fedkit.flower import SERVER_NODE_ID, describe_run, new_context, take_identity

        app, run_id = self._plan.app, run_id_of(self._federation)
        take_identity(SERVER_NODE_ID, run_id)
        run = describe_run(run_id, app.name, app.version)
        self._grid = AppGrid(self.door.link, run, self._emit)
        context = new_context(SERVER_NODE_ID, {}, self._plan.run_config, run_id)
        try:
            server_app(self._grid, context)
        except FedkitError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's app does
            raise FedkitError(
                f"The ServerApp failed with {type(error).__name__}: {error} ({where_raised(error)}); "
                "--debug shows where."
            ) from error

    def _greet(self, hello: dict[str, Any], node_id: int) -> dict[str, Any]:
        """The welcome for a client of the same app; ``Refusal`` for any other."""
        compare_versions(hello.get("version"))
        config = hello.get("config")
        theirs = config if isinstance(config, dict) else {}
        app = self._plan.app
        if "app" not in theirs:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"This server runs the Flower App {app}: start the client with --app, its folder.",
            )
        if (theirs["app"], theirs.get("app-version")) != (app.name, app.version):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"This server runs the Flower App {app}, the client another one or another version of "
                "it: give both the same.",
            )
        name = str(hello.get("name", "a client"))
        if node_id not in self._joined:
            self._joined[node_id] = name
            self._emit(Event("join", client=node_id, name=name))
        return {
            "federation": self._federation,
            "app": app.name,
            "run_config": dict(self._plan.run_config),
        }

    def _part(self, node_id: int) -> None:
        if not self._over:
            self._emit(Event("leave", client=node_id, name=self._joined.get(node_id)))

    def _emit(self, event: Event) -> None:
        with self._lock:
            if self._record is not None:
                self._record(event)
            else:
                self._unwritten.append(event)
        if event.event in ("join", "leave"):
            what = "joined" if event.event == "join" else "is gone"
            self._show(f"node {event.client} {what}: {event.name}")

    def _summary(self, status: str, reason: str) -> dict[str, Any]:
        from fedkit.apps.grid import carried

        app, link, grid = self._plan.app, self.door.link, self._grid
        down, up = carried(link.bytes_sent), carried(link.bytes_received)
        outcomes = dict(grid.outcomes) if grid is not None else {}
        return {
            "schema": SCHEMA,
            "status": status,
            "stop_reason": reason,
            "engine": "grpc",
            "app": app.name,
            "version": app.version,
            "run_id": run_id_of(self._federation),
            "seconds": time.monotonic() - self._started,
            "clients": [{"node": node, "name": name} for node, name in list(self._joined.items())],
            "messages": outcomes,
            "sent_down": sum(down.values()),
            "sent_up": sum(up.values()),
            "sent_down_by_type": down,
            "sent_up_by_type": up,
        }
