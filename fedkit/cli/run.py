"""``fedkit run``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fedkit.cli import flower_app, logs
from fedkit.cli.options import (
    ConfigFile,
    Format,
    Overrides,
    layered,
    wants_json,
    with_settings,
)
from fedkit.engine.plan import LOCAL_DEFAULTS
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    RunSettings,
    ServerSettings,
)

EXAMPLES = """\b
Examples:
  fedkit run --strategy ktpfl --clients 4 --rounds 10
  fedkit run --strategy fedmd --models lenet,resnet18 --partition classes:4 -o digest-epochs=2
  fedkit run --strategy fedavg --model cnn --dry-run
  fedkit run --strategy depthfl --model cnn --depths 1,2,3
  fedkit run --strategy fedprox --model cnn -o work=stragglers:0.9 --corrupt none,none,none,noise:1.0
  fedkit run --config runs/2026-11-21T17-45-03-ktpfl/config.toml
  fedkit run --app ~/quickstart-pytorch --clients 4 --run-config "num-server-rounds=5"
"""
# What differs from `fedkit server`, as the help shows it.
DEFAULTS = {
    "rounds": f"{LOCAL_DEFAULTS['rounds']} rounds",
    "alone": "yes",
    "num-shards": "as many as clients",
    "min-clients": "all of them",
    "listen": "127.0.0.1 and a free port",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Run a whole federation on this machine.")(run)


@with_settings(
    FederationSettings,
    RunSettings,
    ServerSettings,
    DataSettings,
    defaults=DEFAULTS,
)
def run(
    config: ConfigFile = None,
    option: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print who would get what, and start nothing.")
    ] = False,
    app: flower_app.App = None,
    run_config: flower_app.RunConfig = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Run a whole federation on this machine: a server and its clients, as real processes."""
    from fedkit.engine.local import run_local
    from fedkit.engine.plan import make_plan
    from fedkit.report import print_result

    as_json = wants_json(format)
    values = layered(config, option, settings)
    folder = flower_app.app_in(app, values)
    if folder is not None:
        flower_app.refuse_with_app(["dry-run"] if dry_run else [])
        flower_app.run(folder, run_config, values, as_json=as_json)
        return
    flower_app.refuse_without_app(run_config=run_config)
    plan = make_plan(values, local=True)
    if dry_run:
        from fedkit.engine.dryrun import dry_run as plan_only
        from fedkit.engine.dryrun import print_plan

        planned = plan_only(plan)
        print(json.dumps(planned, indent=2)) if as_json else print_plan(planned)
        return
    progress = logs.progress(plan.federation)
    try:
        result = run_local(plan, [progress.take])
    finally:
        progress.close()
    print_result(result.summary, result.directory, as_json=as_json)
