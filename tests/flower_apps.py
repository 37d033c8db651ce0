"""Flower Apps for tests, and a federation of one in this process: real server, real link, real clients."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from links import LONG, background
from processes import until

from fedkit.apps.bundle import FlowerApp, read_app
from fedkit.apps.client import AppClient, AppClientPlan
from fedkit.apps.server import AppPlan, serve_app
from fedkit.security.settings import ServerSecurity
from fedkit.settings import ServerSettings

APPS = Path(__file__).parent / "apps"


def quickstart(**components: str) -> FlowerApp:
    """The quickstart, with other components where given."""
    app = read_app(APPS / "quickstart")
    project: dict[str, Any] = {**app.project, "tool": {"flwr": {"app": {**_table(app)}}}}
    project["tool"]["flwr"]["app"]["components"] = {**_table(app)["components"], **components}
    return replace(app, project=project)


def with_client(folder: Path, client_app: str) -> Path:
    """A copy of the quickstart in ``folder`` with another ClientApp."""
    shutil.copytree(APPS / "quickstart", folder, dirs_exist_ok=True)
    file = folder / "pyproject.toml"
    file.write_text(file.read_text().replace("quickstart.client_app:app", client_app))
    return folder


def _table(app: FlowerApp) -> dict[str, Any]:
    table: dict[str, Any] = app.project["tool"]["flwr"]["app"]
    return table


def asking(what: Callable[[Grid, Context], Any]) -> ServerApp:
    """A ServerApp whose main is ``what``."""
    app = ServerApp()
    app.main()(what)
    return app


def counting() -> ClientApp:
    """Counts, and fails when it is told to; whatever it does, it has counted before."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = context.state.metric_records.get("count", MetricRecord({"n": 0}))["n"] + 1
        context.state["count"] = MetricRecord({"n": count})
        how = message.content["config"].get("fail", "")
        if how == "raise":
            raise ZeroDivisionError("division by zero")
        if how == "exit":
            sys.exit("enough")
        if how == "state":
            context.state = {}
        if how == "reply":
            return None
        content = RecordDict({"metrics": MetricRecord({"n": count})})
        return Message(content, reply_to=message)

    return app


class AppFederation:
    """A server of an app, and as many clients as are started."""

    def __init__(
        self,
        folder: Path,
        app: FlowerApp,
        *run_config: str,
        server_app: ServerApp | None = None,
        min_clients: int = 2,
    ) -> None:
        self.folder, self.app = folder, app
        settings = ServerSettings(listen="127.0.0.1:0", run_dir=str(folder / "run"))
        config = app.run_config(run_config)
        plan = AppPlan(app, config, min_clients, settings, ServerSecurity())
        self.lines: list[str] = []
        part = server_app or app.server_app()
        self._served = background(lambda: serve_app(plan, part, self.lines.append))
        file = folder / "run" / "address"
        until(lambda: file.exists() or self._served.done())
        if self._served.done():
            self._served.result()
        self.address = file.read_text()

    def client(
        self,
        partition: int,
        *,
        of: int = 2,
        app: FlowerApp | None = None,
        client_app: ClientApp | None = None,
        **node_config: Any,
    ) -> Future[str]:
        """Start one."""
        app = app or self.app
        plan = AppClientPlan(
            server=self.address,
            state_dir=self.folder / f"client-{partition}",
            app=app,
            client_app=client_app or app.client_app(),
            node_config={"partition-id": partition, "num-partitions": of, **node_config},
            max_wait=5.0,
        )
        return background(AppClient(plan).run)

    def result(self) -> dict[str, Any]:
        """The summary, once the run is over."""
        return self._served.result(2 * LONG)[1]

    def run(self, clients: int, client_app: ClientApp | None = None) -> dict[str, Any]:
        """With so many clients, to the end."""
        goodbyes = [self.client(n, of=clients, client_app=client_app) for n in range(clients)]
        summary = self.result()
        for goodbye in goodbyes:
            assert "is over" in goodbye.result(LONG)
        return summary
