"""``fedkit server``."""

from __future__ import annotations

from typing import Any

import typer

from fedkit.cli.options import ConfigFile, Overrides, with_settings
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    ServerSettings,
    merge,
    read_overrides,
    read_toml,
)

EXAMPLES = """Examples:

  fedkit server --strategy ktpfl

  fedkit server --strategy fedavg --model cnn --dataset mnist --data-root ~/data -o local-epochs=1

  fedkit server --config runs/2026-11-21T17-45-03-ktpfl/config.toml --run-dir again
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES)(server)


@with_settings(FederationSettings, ServerSettings, DataSettings)
def server(
    config: ConfigFile = None, option: Overrides = None, *, settings: dict[str, Any]
) -> None:
    """Run a federation's server: wait for clients, run the rounds, write the result."""
    from fedkit.cli.app import quiet, say_goodbye_to_parent
    from fedkit.engine.plan import make_plan
    from fedkit.engine.server import serve
    from fedkit.report import Progress, print_result

    say_goodbye_to_parent()
    given = merge(read_toml(config) if config else {}, read_overrides(option or []), settings)
    plan = make_plan(given)
    progress = Progress(plan.federation.rounds, quiet=quiet)
    progress.waiting(plan.federation.min_clients, plan.server.listen)
    path, summary = serve(plan, [progress.take])
    print_result(summary, path)
