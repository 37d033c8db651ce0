"""``fedkit list``."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import Annotated, Any

import typer

from fedkit.cli.models import look_at, model_rows, print_models
from fedkit.cli.options import Format, wants_json, with_settings
from fedkit.errors import UsageError
from fedkit.registry import KINDS, all_names, load, suggest
from fedkit.settings import DataSettings

EXAMPLES = """\b
Examples:
  fedkit list models
  fedkit list models --dataset cifar100:coarse
  fedkit list models --shape 3x64x64 --classes 200 --format json
  fedkit list settings ktpfl
  fedkit list settings flwr:FedAdam
  fedkit list partitions --format json
"""
SHOWN = [kind for kind in KINDS if kind != "clients"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list", epilog=EXAMPLES, short_help="Tell what there is.")(list_names)


@with_settings(DataSettings)
def list_names(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(SHOWN)}, settings.")],
    strategy: Annotated[
        str, typer.Argument(help="With settings: the strategy whose hyper-parameters to show.")
    ] = "ktpfl",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="With models: the data set that they are to read.  [default: digits]",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="CxHxW",
            help="With models, instead of a data set: channels, height and width of images, or the "
            "number of features or tokens.  [default: none]",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="With --shape: the number of classes.", show_default=False),
    ] = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Tell what there is, one line each, plug-ins included; of models also what they cost."""
    as_json = wants_json(format)
    if kind != "models" and (dataset, shape, classes) != (None, None, None):
        raise UsageError("--dataset, --shape and --classes go with `fedkit list models` alone.")
    if kind == "models":
        look = look_at(dataset, shape, classes, settings)
        rows = model_rows(look)
        if not as_json:
            print_models(rows, look)
            return
    elif kind == "settings":
        rows = _settings(strategy)
    elif kind in SHOWN:
        rows = [{"name": name, "about": _about(load(kind, name))} for name in all_names(kind)]
    else:
        known = [*SHOWN, "settings"]
        raise UsageError(f"There is no list of {kind!r}{suggest(kind, known)}.")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['about']}")


def _about(thing: Any) -> str:
    text = inspect.getdoc(thing) or ""
    return text.partition("\n")[0]


def _settings(strategy: str) -> list[dict[str, Any]]:
    from fedkit.cli.options import describe
    from fedkit.security.settings import ServerSecurity
    from fedkit.settings import (
        DataSettings,
        FederationSettings,
        RunSettings,
        ServerSettings,
        default_of,
        key,
    )

    kind = load("strategies", strategy)
    rows = []
    for group in (
        kind.Hyperparameters,
        FederationSettings,
        ServerSettings,
        ServerSecurity,
        DataSettings,
        RunSettings,
    ):
        # What the others start from comes first.
        for item in sorted(fields(group), key=lambda item: item.name != "preset"):
            source = item.metadata["source"]
            about = describe(item) + (f"  ({source})" if source else "")
            rows.append({"name": key(item.name), "about": about, "default": default_of(item)})
    return rows
