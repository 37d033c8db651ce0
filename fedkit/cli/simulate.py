"""``fedkit simulate``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli import logs, terminal
from fedkit.cli.options import (
    ConfigFile,
    Format,
    Overrides,
    layered,
    wants_json,
    with_settings,
)
from fedkit.cli.run import DEFAULTS
from fedkit.settings import DataSettings, FederationSettings, RunSettings, build, key
from fedkit.simulation.settings import WorkerSettings

EXAMPLES = """\b
Examples:
  fedkit simulate --clients 100 --strategy ktpfl --models lenet,cnn --rounds 20
  fedkit simulate --clients 1000 --strategy fedavg --select uniform:0.05 --eval-every 10
  fedkit simulate --clients 200 --strategy fedavg --model mlp:32 --models mlp:32 --batched 16
  fedkit simulate --clients 1000000 --num-shards 100 --partition iid --strategy fedavg --select uniform:50
  fedkit simulate --clients 20 --strategy fedmd --workers 8 --device cuda
  fedkit simulate --clients 20 --strategy fedavg --engine ray
  fedkit simulate --config runs/2026-11-21T17-45-03-ktpfl/config.toml
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Run a federation without a network, fast.")(simulate)


@with_settings(
    FederationSettings,
    RunSettings,
    WorkerSettings,
    DataSettings,
    defaults={name: text for name, text in DEFAULTS.items() if name != "listen"},
)
def simulate(
    config: ConfigFile = None,
    option: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the results.  [default: runs/TIME-STRATEGY]",
            show_default=False,
        ),
    ] = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Run a federation without a network: clients in worker processes that share arrays.

    The numbers are those of `fedkit run` and of `fedkit server` with its clients, for the same seed.
    """
    from fedkit.engine.plan import make_plan
    from fedkit.report import print_result
    from fedkit.simulation.engines import engine
    from fedkit.simulation.progress import SimulationBar

    as_json = wants_json(format)
    typed = settings | ({"run-dir": str(run_dir)} if run_dir is not None else {})
    values = layered(config, option, typed)
    workers = build(WorkerSettings, values)
    run_simulation = engine(workers.engine)
    own = {key(item.name) for item in fields(WorkerSettings)}
    plan = make_plan({k: v for k, v in values.items() if k not in own}, local=True)
    shown = not (terminal.quiet or logs.as_json)
    bar = SimulationBar(plan.federation.rounds, shown=shown)
    progress = logs.progress(plan.federation, bar.console)
    try:
        result = run_simulation(plan, workers, [progress.take, bar.take], bar.worked)
    finally:
        bar.close()
    print_result(result.summary, result.directory, as_json=as_json)
