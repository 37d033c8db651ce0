"""``fedkit selector``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from fedkit.cli import terminal
from fedkit.cli.options import Format, wants_json, with_settings
from fedkit.devices.settings import ObjectiveSettings, SimulationSettings
from fedkit.errors import UsageError
from fedkit.settings import DataSettings

TRAIN = """\b
Examples:
  fedkit selector train --out policy.safetensors
  fedkit selector train --out policy.safetensors --clients 50 --profiles pi4,mine.toml --w2 0.5
  fedkit selector train --out policy.safetensors --episodes 80 -o min-share=0.7 -o discount=0.5
  fedkit run --strategy fedavg --model cnn --select fedmarl:policy.safetensors
"""
SHOW = """\b
Examples:
  fedkit selector show policy.safetensors
  fedkit selector show policy.safetensors --format json
"""
LINES = 10
Name = Annotated[
    str,
    typer.Option(
        "--trainer",
        help="What is trained: see `fedkit list trainers`.  [default: fedmarl]",
        show_default=False,
    ),
]


class Trainer(Protocol):
    """What `fedkit.trainers` names."""

    def train(
        self,
        simulation: SimulationSettings,
        objective: ObjectiveSettings,
        options: Mapping[str, Any],
        episodes: int,
        sources: DataSettings,
        out: Path,
        tell: Callable[[int, int, Any, float], None],
    ) -> Any:
        """Train a policy and save it."""
        ...

    def describe(self, path: Path) -> dict[str, Any]:
        """What a saved policy says of itself."""
        ...


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command(epilog=TRAIN, short_help="Train a policy on simulated devices.")(train)
    group.command(epilog=SHOW, short_help="Tell what a policy was trained on.")(show)
    app.add_typer(group, name="selector", help="Train selectors that learn, and look at policies.")


@with_settings(SimulationSettings, ObjectiveSettings, DataSettings)
def train(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Write the policy there.", show_default=False)
    ],
    episodes: Annotated[
        int,
        typer.Option(
            min=1, help="On how many federations to train.  [default: 150]", show_default=False
        ),
    ] = 150,
    trainer: Name = "fedmarl",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="A hyper-parameter of the trainer, as in -o discount=0.9; may be repeated.",
        ),
    ] = None,
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Train a policy on simulated devices, and compare it on federations that it has not seen."""
    from fedkit.registry import load
    from fedkit.settings import build, read_overrides

    as_json = wants_json(format)
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent} for the policy: make it first.")
    # Before the minutes that training takes.
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out} is a folder, or in one that can't be written: give a file's name.")
    sources = build(DataSettings, settings)
    simulation = build(SimulationSettings, settings)
    objective = build(ObjectiveSettings, settings)
    made: Trainer = load("trainers", trainer)()
    with _Curve(quiet=as_json or terminal.quiet) as curve:
        trained = made.train(
            simulation, objective, read_overrides(option or []), episodes, sources, out, curve
        )
    if as_json:
        print(json.dumps(trained.about, indent=2))
        return
    _print_results(trained.about["results"])
    print(f"The policy is in {out}; use it with --select {trainer}:{out}.")


def show(
    policy: Annotated[Path, typer.Argument(help="A file of `fedkit selector train`.")],
    trainer: Name = "fedmarl",
    format: Format = "text",
) -> None:
    """Tell what a policy was trained on, and how it did on federations that it had not seen."""
    from fedkit.registry import load

    as_json = wants_json(format)
    made: Trainer = load("trainers", trainer)()
    about = made.describe(policy)
    if as_json:
        print(json.dumps(about, indent=2))
        return
    for name, value in about.items():
        if name != "results":
            print(f"{name}: {_words(value)}")
    if "results" in about:
        _print_results(about["results"])


class _Curve:
    """A progress bar, and ten lines of the learning curve."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._recent: list[Any] = []
        self._started = time.monotonic()
        self._bar = Progress(
            "episode",
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=None)
        self._quiet = quiet

    def __enter__(self) -> _Curve:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, of: int, result: Any, epsilon: float) -> None:
        self._bar.update(self._task, completed=done, total=of)
        self._recent.append(result)
        if self._quiet or (done % max(of // LINES, 1) and done != of):
            return
        objective, accuracy, kept = (
            sum(getattr(each, name) for each in self._recent) / len(self._recent)
            for name in ("objective", "accuracy", "kept")
        )
        self._recent.clear()
        self._bar.console.print(
            f"episode {done:>5}  objective {objective:7.2f}  accuracy {accuracy:.3f}  "
            f"kept {kept:5.1f}  epsilon {epsilon:.2f}  {time.monotonic() - self._started:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def _print_results(results: Mapping[str, list[Mapping[str, Any]]]) -> None:
    from rich.table import Table

    from fedkit.report import size, wide_console

    count = max(len(each) for each in results.values())
    table = Table(title=f"On {count} federations that it was not trained on (means)")
    for name in ("", "accuracy", "seconds", "up", "kept a round", "objective"):
        table.add_column(name, justify="right" if name else "left")
    for name, each in results.items():
        accuracy, seconds, sent, kept, objective = (
            sum(result[field] for result in each) / len(each)
            for field in ("accuracy", "seconds", "bytes_up", "kept", "objective")
        )
        table.add_row(
            name,
            f"{accuracy:.3f}",
            f"{seconds:,.0f}",
            size(round(sent)),
            f"{kept:.1f}",
            f"{objective:.2f}",
        )
    wide_console().print(table)


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {entry}" for name, entry in value.items())
