"""``fedkit partition``."""

from __future__ import annotations

import json
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fedkit.cli.options import ConfigFile, Format, layered, wants_json, with_settings
from fedkit.errors import UsageError
from fedkit.settings import DataSettings, FederationSettings

if TYPE_CHECKING:
    from fedkit.data.splits import FederatedData

EXAMPLES = """\b
Examples:
  fedkit partition --dataset cifar10 --partition dirichlet:0.5 --num-shards 20 --plot who.png
  fedkit partition --partition share:0.05+classes:2 --num-shards 10
  fedkit partition --config runs/2026-11-21T17-45-03-ktpfl/config.toml --format json
"""
# Of the federation's settings, those that say who holds what.
DEALING = ("dataset", "public", "partition", "num_shards", "seed")
DealingSettings = make_dataclass(
    "DealingSettings",
    [
        (
            item.name,
            get_type_hints(FederationSettings)[item.name],
            field(default=item.default, metadata=item.metadata),
        )
        for item in fields(FederationSettings)
        if item.name in DEALING
    ],
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Show who would hold what.")(partition)


@with_settings(DealingSettings, DataSettings)
def partition(
    config: ConfigFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw it: bars and a heat map, as .png, .svg or .pdf.  [default: none]",
            show_default=False,
        ),
    ] = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Show who would hold what in a run with these settings, and how skewed that is."""
    from fedkit.data.drawing import check_picture
    from fedkit.data.names import check_names, partition_specs, public_parts
    from fedkit.registry import allow
    from fedkit.settings import build

    as_json = wants_json(format)
    if plot is not None:
        check_picture(plot)
    values = layered(config, None, settings)
    sources = build(DataSettings, values)
    federation = build(FederationSettings, values)
    allow(federation.dataset, *partition_specs(federation))
    if federation.public != "auto":
        allow(public_parts(federation)[0])
    check_names(federation)
    from fedkit.data.splits import cut

    data = cut(federation, sources)
    if not len(data.dataset.train):
        raise UsageError(
            f"With {federation.dataset} every client brings its own data: none are dealt."
        )
    shown = describe(data)
    print(json.dumps(shown, indent=2)) if as_json else _print(shown)
    if plot is not None:
        _draw(data, shown, plot)
        if not as_json:
            print(f"Drawn to {plot}.")


def describe(data: FederatedData) -> dict[str, Any]:
    """Who holds what: a row for each shard, the means, and what nobody or everybody has.

    The skew is that of all a shard has, its share of a shared pool included.
    """
    import numpy as np

    from fedkit.data import skew

    counts, names, whole = _counts(data)
    distance = skew.total_variation(counts, whole)
    effective = skew.effective_classes(counts)
    largest = skew.largest_share(counts)
    dealt, settings = data.dealt, data.settings
    rows = [
        {
            "shard": shard,
            "samples": len(dealt.parts[shard]),
            "shared": len(dealt.shared[shard]),
            "classes": int((counts[shard] > 0).sum()),
            "largest_class": names[int(counts[shard].argmax())],
            "largest_share": float(largest[shard]),
            "total_variation": float(distance[shard]),
            "effective_classes": float(effective[shard]),
        }
        for shard in range(len(counts))
    ]
    averaged = (
        "samples",
        "shared",
        "classes",
        "largest_share",
        "total_variation",
        "effective_classes",
    )
    return {
        "dataset": settings.dataset,
        "partition": settings.partition,
        "num_shards": settings.num_shards,
        "seed": settings.seed,
        "public": settings.public,
        "sha256": data.partition_digest,
        "shards": rows,
        "mean": {name: float(np.mean([row[name] for row in rows])) for name in averaged},
        "dropped": dealt.dropped,
        "shared_pool": len(np.unique(np.concatenate(dealt.shared))),
    }


def _counts(data: FederatedData) -> tuple[Any, list[str], Any]:
    """What each shard has of each private class, these classes' names, and how many there are in all."""
    import numpy as np

    from fedkit.data.skew import class_counts

    labels = data.dataset.train.labels.numpy()
    # The public set's own classes, where they are outputs of the networks, come first.
    first = len(data.classes) - len(data.dataset.classes)
    held = [np.concatenate(both) for both in zip(data.dealt.parts, data.dealt.shared, strict=True)]
    counts = class_counts(labels - first, held, len(data.dataset.classes))
    whole = np.bincount(labels - first, minlength=len(data.dataset.classes))
    return counts, list(data.dataset.classes), whole


def _print(shown: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fedkit.report import wide_console

    console = wide_console()
    table = Table(title=escape(_title(shown)))
    some_shared = shown["shared_pool"] > 0
    columns = ["shard", "samples", *(["shared"] if some_shared else []), "classes"]
    for name in [*columns, "largest class", "its share", "distance", "effective classes"]:
        table.add_column(name, justify="left" if name == "largest class" else "right")
    mean = {**shown["mean"], "shard": "mean", "largest_class": ""}
    for row in shown["shards"]:
        table.add_row(*_cells(row, some_shared), end_section=row is shown["shards"][-1])
    table.add_row(*_cells(mean, some_shared))
    console.print(table)
    console.print(
        "distance: total variation from the label distribution of the whole data set, 0 to 1; "
        "effective classes: exp(entropy)",
        soft_wrap=True,
    )
    console.print(escape(_leftovers(shown)), soft_wrap=True)


def _cells(row: dict[str, Any], some_shared: bool) -> list[str]:
    from rich.markup import escape

    from fedkit.data.drawing import readable

    whole = [f"{row[name]:,.0f}" for name in ("samples", *(["shared"] if some_shared else []))]
    return [
        str(row["shard"]),
        *whole,
        f"{row['classes']:g}",
        escape(readable(row["largest_class"])) if row["largest_class"] else "",
        f"{row['largest_share']:.3f}",
        f"{row['total_variation']:.3f}",
        f"{row['effective_classes']:.2f}",
    ]


def _title(shown: dict[str, Any]) -> str:
    return f"{shown['partition']} of {shown['dataset']} over {shown['num_shards']} shards"


def _leftovers(shown: dict[str, Any]) -> str:
    some = f"{shown['dropped']:,} samples are held by nobody"
    nobody = some if shown["dropped"] else "every sample is held"
    shared = f"; {shown['shared_pool']:,} are shared" if shown["shared_pool"] else ""
    return f"seed {shown['seed']}, public set {shown['public']}: {nobody}{shared}"


def _draw(data: FederatedData, shown: dict[str, Any], path: Path) -> None:
    from fedkit.data.drawing import draw

    counts, names, _ = _counts(data)
    mean = shown["mean"]
    about = (
        f"{_leftovers(shown)}\nmean distance from the whole {mean['total_variation']:.3f}, mean "
        f"effective classes {mean['effective_classes']:.2f} of {len(names)}"
    )
    draw(counts, names, _title(shown), about, path)
