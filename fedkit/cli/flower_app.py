"""``--app`` of `fedkit server`, `client` and `run`: somebody's own Flower App instead of a strategy."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli import logs, terminal
from fedkit.errors import UsageError
from fedkit.security.settings import ServerSecurity, check_server
from fedkit.settings import FederationSettings, RunSettings, ServerSettings, Value, build

App = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Run the Flower App in that folder, unchanged, instead of one of fedkit's strategies. Its "
        "code is run: give only what you trust.  [default: none]",
        show_default=False,
    ),
]
RunConfig = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'KEY=VALUE ...'|FILE",
        help="With --app: other values for the app's [tool.flwr.app.config], as `flwr run` takes them; may "
        "be repeated.  [default: none]",
        show_default=False,
    ),
]
NodeConfig = Annotated[
    str | None,
    typer.Option(
        metavar="'KEY=VALUE ...'|FILE",
        help="With --app: what the app is told of this device, as flower-supernode takes it.  [default: "
        "nothing]",
        show_default=False,
    ),
]
# Settings of fedkit's own that an app's server has a use for.
SERVER = {
    *("listen", "run-dir", "reconnect-grace", "max-message", "min-clients"),
    *("insecure", "ssl-ca-certfile", "ssl-certfile", "ssl-keyfile", "tokens"),
}
RUN = {"listen", "run-dir", "min-clients", "clients"}


def app_in(app: Path | None, values: dict[str, Value]) -> Path | None:
    """The app's folder, typed or from a settings file, which then holds it no more."""
    from_file = values.pop("app", None)
    return app if app is not None or from_file is None else Path(str(from_file))


def refuse_without_app(**options: object) -> None:
    """Raise ``UsageError`` if an option is given that goes with ``--app`` only."""
    for name, value in options.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} is for a Flower App: give --app, too.")


def refuse_with_app(names: Iterable[str], allowed: Iterable[str] = ()) -> None:
    """Raise ``UsageError`` for a setting of fedkit's own strategies."""
    for name in names:
        if name not in allowed:
            raise UsageError(
                f"{name} is a setting of fedkit's own strategies, and --app runs a Flower App: what "
                "that can be told stands in its pyproject.toml and in --run-config."
            )


def server(
    folder: Path, run_config: list[str] | None, values: dict[str, Value], *, as_json: bool
) -> None:
    """`fedkit server --app`."""
    from fedkit.apps.bundle import read_app
    from fedkit.apps.server import AppPlan, serve_app
    from fedkit.rundir import default_path

    texts = _run_config(run_config, values)
    refuse_with_app(values, SERVER)
    app = read_app(folder)
    settings = build(ServerSettings, values)
    security = build(ServerSecurity, values)
    check_server(settings.listen, security)
    run_dir = Path(settings.run_dir or default_path(app.name.rpartition("/")[2])).absolute()
    plan = AppPlan(
        app=app,
        run_config=app.run_config(texts),
        min_clients=build(FederationSettings, values).min_clients,
        server=build(ServerSettings, {**values, "run-dir": str(run_dir)}),
        security=security,
    )
    _flower_speaks()
    # The app may print, and the summary on stdout is for a program.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        path, summary = serve_app(plan, app.server_app(), _show)
    _print(summary, path, as_json=as_json)


def run(
    folder: Path, run_config: list[str] | None, values: dict[str, Value], *, as_json: bool
) -> None:
    """`fedkit run --app`."""
    from fedkit.apps.bundle import read_app
    from fedkit.apps.local import LocalApp, run_app
    from fedkit.rundir import default_path
    from fedkit.security.settings import is_loopback

    texts = _run_config(run_config, values)
    refuse_with_app(values, RUN)
    app = read_app(folder)
    app.run_config(texts)  # refused before anything is started
    clients = build(RunSettings, values).clients
    everybody = build(FederationSettings, {"min-clients": clients, **values}).min_clients
    if everybody > clients:
        raise UsageError(f"min-clients is {everybody}, but only {clients} clients are started.")
    settings = build(ServerSettings, {"listen": "127.0.0.1:0", **values})
    if not is_loopback(settings.listen):
        raise UsageError(
            f"`fedkit run` stays on this machine and can't listen on {settings.listen}: start a `fedkit "
            "server` and clients of its own."
        )
    path = Path(settings.run_dir or default_path(app.name.rpartition("/")[2])).absolute()
    plan = LocalApp(app, texts, clients, everybody, settings.listen, path)
    summary = run_app(plan, show=not (as_json or terminal.quiet))
    if as_json:
        _print(summary, path, as_json=True)


def client(folder: Path, node_config: str | None, connection: Mapping[str, Any]) -> None:
    """`fedkit client --app`; ``connection``: the fields of ``Connection``."""
    from fedkit.apps.bundle import read_app, read_pairs
    from fedkit.apps.client import AppClient, AppClientPlan

    app = read_app(folder)
    told = read_pairs("--node-config", [node_config] if node_config else [])
    _flower_speaks()
    plan = AppClientPlan(app=app, client_app=app.client_app(), node_config=told, **connection)
    goodbye = AppClient(plan).run()
    if not terminal.quiet:
        print(goodbye)


def _run_config(run_config: list[str] | None, values: dict[str, Value]) -> list[str]:
    """What is typed wins over what a settings file names."""
    from_file = values.pop("run-config", None)
    return [*([] if from_file is None else [str(from_file)]), *(run_config or [])]


def _flower_speaks() -> None:
    """Let Flower's log, by which an app's strategy tells of its rounds, go where fedkit's goes."""
    import fedkit.flower  # noqa: F401  (Flower sets its logger up when it is imported)

    log = logging.getLogger("flwr")
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.setLevel(logging.WARNING if terminal.quiet else logging.INFO)


def _show(line: str) -> None:
    if logs.as_json:
        logging.getLogger("fedkit.run").info("%s", line)
    elif not terminal.quiet:
        print(line, file=sys.stderr, flush=True)


def _print(summary: dict[str, Any], path: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run_dir": str(path), **summary}, indent=2))
    elif not terminal.quiet:
        from fedkit.report import size

        count = summary["messages"]
        print(
            f"{summary['app']} {summary['version']}: {count.get('sent', 0)} messages to "
            f"{len(summary['clients'])} clients, {count.get('answered', 0)} answered, in "
            f"{summary['seconds']:.1f} s; {size(summary['sent_down'])} down, "
            f"{size(summary['sent_up'])} up"
        )
        print(f"Everything is in {path}")
