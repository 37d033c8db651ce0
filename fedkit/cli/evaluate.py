"""``fedkit evaluate``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fedkit.cli.export import FederationId, ModelLabel, ModelPlace
from fedkit.cli.options import Format, wants_json, with_settings
from fedkit.settings import DataSettings

EXAMPLES = """\b
Examples:
  fedkit evaluate runs/2026-11-21T17-45-03-ktpfl
  fedkit evaluate runs/2026-11-21T17-45-03-fedavg --model global --format json
  fedkit evaluate /var/lib/fedkit --data-root ~/data --device cpu
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Measure the models of a run or a client.")(evaluate)


@with_settings(DataSettings)
def evaluate(
    path: ModelPlace,
    model: ModelLabel = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Measure on this data set's test set: see `fedkit list datasets`.  [default: the "
            "federation's common test set, and the client's own test data]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to compute: auto, cpu, cuda, cuda:I or mps.  [default: as in the run: cpu "
            "for the server's models, auto for clients']",
            show_default=False,
        ),
    ] = None,
    federation: FederationId = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Measure the models of a run or a client: all of them, unless --model names one."""
    from fedkit.data.names import check_dataset
    from fedkit.engine.saved import chosen, data_of, models_of
    from fedkit.registry import allow
    from fedkit.settings import build, merge

    as_json = wants_json(format)
    sources = build(DataSettings, merge(data_of(path), settings))
    if dataset is not None:
        allow(dataset)
        check_dataset(dataset)
    found = models_of(path, federation)
    wanted = found if model is None else [chosen(found, model, path)]
    from fedkit.engine import evaluate as measuring

    rows = [
        {"model": one.label, **row}
        for one in wanted
        for row in measuring.evaluate(one.read(), sources, dataset=dataset, device=device)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [["model", "network", "round", "data", "n", "accuracy", "loss"]]
    for row in rows:
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        after = "-" if row["round"] is None else str(row["round"])
        data = f"{row['dataset']} {row['data']}"
        accuracy = f"{row['accuracy']:.4f}"
        cells.append(
            [row["model"], row["architecture"], after, data, str(row["n"]), accuracy, loss]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [
            cell.ljust(width) if at in (0, 1, 3) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())
