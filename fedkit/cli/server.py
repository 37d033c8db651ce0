"""``fedkit server``."""

from __future__ import annotations

from typing import Any

import typer

from fedkit.cli import terminal
from fedkit.cli.options import (
    ConfigFile,
    Format,
    Overrides,
    layered,
    wants_json,
    with_settings,
)
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
  fedkit server --config runs/2026-11-21T17-45-03-ktpfl/config.toml --run-dir again
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Run a federation's server.")(server)


@with_settings(FederationSettings, ServerSettings, DataSettings)
def server(
    config: ConfigFile = None,
    option: Overrides = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Run a federation's server: wait for clients, run the rounds, write the result."""
    from fedkit.engine.plan import make_plan
    from fedkit.engine.server import serve
    from fedkit.report import Progress, print_result

    as_json = wants_json(format)
    terminal.end_with_parent()
    plan = make_plan(layered(config, option, settings, not_in_file=RunSettings))
    progress = Progress(plan.federation, quiet=terminal.quiet)
    try:
        path, summary = serve(plan, [progress.take])
    finally:
        progress.close()
    print_result(summary, path, as_json=as_json)
