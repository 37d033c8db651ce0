"""``fedkit data``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedkit import registry
from fedkit.cli.findings import tell
from fedkit.cli.options import Format, wants_json, with_settings
from fedkit.settings import DataSettings, build

CHECK = """\b
Examples:
  fedkit data check folder:~/pictures,size=32
  fedkit data check csv:readings.csv,label=state --format json
  fedkit data check cifar100:coarse --public cifar10:5000 --data-root ~/data
  fedkit data check own:cat,dog --public folder:~/public,size=32
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command(epilog=CHECK, short_help="Tell what a data set holds, and what is broken.")(check)
    app.add_typer(group, name="data", help="Look at data before anything is joined.")


@with_settings(DataSettings)
def check(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="As for --dataset: see `fedkit list datasets`.")
    ],
    public: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET[:COUNT]",
            help="A public set: whether it fits, and whether it holds private samples.",
            show_default=False,
        ),
    ] = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Read all of a data set and tell what would be used; exit code 1 if anything is broken."""
    as_json = wants_json(format)
    sources, named = build(DataSettings, settings), [dataset]
    if public is not None:
        # With and without a number of samples.
        named += [public, public.rpartition(":")[0]]
    registry.allow(*named)
    from fedkit.data.examine import examine

    tell(examine(dataset, sources, public), {"dataset": dataset}, width=12, as_json=as_json)
