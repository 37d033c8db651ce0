"""``fedkit server``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli import flower_app, logs, terminal
from fedkit.cli.options import (
    ConfigFile,
    Format,
    Overrides,
    layered,
    wants_json,
    with_settings,
)
from fedkit.errors import UsageError
from fedkit.security.settings import ServerSecurity
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    RunSettings,
    ServerSettings,
)

EXAMPLES = """\b
Examples:
  fedkit server --strategy ktpfl
  fedkit server --strategy fedavg --model cnn --dataset mnist --data-root ~/data -o local-epochs=1
  fedkit server --listen 0.0.0.0:8090 --ssl-certfile certs/server.pem --ssl-keyfile certs/server.key
  fedkit server --config runs/2026-11-21T17-45-03-ktpfl/config.toml --run-dir again
  fedkit server --resume runs/2026-11-21T17-45-03-ktpfl
  fedkit server --strategy ktpfl --run-dir /var/lib/fedkit/run --resume auto
  fedkit server --app ~/quickstart-pytorch --run-config "num-server-rounds=5 learning-rate=0.05"
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Run a federation's server.")(server)


@with_settings(FederationSettings, ServerSettings, ServerSecurity, DataSettings)
def server(
    config: ConfigFile = None,
    option: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|auto",
            help="Go on with the run in that folder; auto: with the one in --run-dir if it has begun "
            "and is not over, else begin one there (for service managers).",
        ),
    ] = None,
    app: flower_app.App = None,
    run_config: flower_app.RunConfig = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Run a federation's server: wait for clients, run the rounds, write the result."""
    from fedkit.engine.plan import make_plan
    from fedkit.engine.resume import is_over, resumed_plan
    from fedkit.engine.server import serve
    from fedkit.report import print_result

    as_json = wants_json(format)
    terminal.end_with_parent()
    typed = layered(config, option, settings, not_in_file=RunSettings)
    folder = flower_app.app_in(app, typed)
    if folder is not None:
        flower_app.refuse_with_app(["resume"] if resume else [])
        flower_app.server(folder, run_config, typed, as_json=as_json)
        return
    flower_app.refuse_without_app(run_config=run_config)
    resumed = _run_to_resume(resume, typed)
    plan = make_plan(typed) if resumed is None else resumed_plan(resumed, typed)
    if resumed is not None and is_over(plan):
        print(f"The run in {resumed} is over: there is nothing to go on with.")
        return
    progress = logs.progress(plan.federation)
    try:
        path, summary = serve(plan, [progress.take], resume=resumed is not None)
    finally:
        progress.close()
    print_result(summary, path, as_json=as_json)


def _run_to_resume(resume: str | None, typed: dict[str, Any]) -> Path | None:
    from fedkit.engine.resume import can_resume

    if resume != "auto":
        return Path(resume) if resume is not None else None
    if not typed.get("run-dir"):
        raise UsageError(
            "--resume auto needs --run-dir, the folder in which the run is or will be."
        )
    run = Path(str(typed["run-dir"]))
    return run if can_resume(run) else None
