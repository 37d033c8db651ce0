"""``fedkit list models``: what each network costs on given data."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fedkit.errors import FedkitError, UsageError
from fedkit.registry import allow, load, names
from fedkit.settings import DataSettings, build

if TYPE_CHECKING:
    from fedkit.models.known import Look

# The line of a factory's docstring that says what it does where torchvision's original would fail.
SMALL_IMAGES = "Small images: "
LARGEST_CLASSES = 1_000_000


def look_at(
    dataset: str | None, shape: str | None, classes: int | None, settings: dict[str, Any]
) -> Look:
    """What the networks are to read, from the command's options.

    Raises:
        UsageError: they contradict each other.
        FedkitError: the data set can't be read.
    """
    from fedkit.models.known import Look, known_look

    if shape is not None:
        if dataset is not None:
            raise UsageError("--shape and --dataset both say what the data are: give one of them.")
        if classes is None or not 1 <= classes <= LARGEST_CLASSES:
            raise UsageError(f"--shape needs --classes beside it, from 1 to {LARGEST_CLASSES}.")
        sizes = _sizes(shape)
        return Look(sizes, classes, tokens=None if len(sizes) == 1 else False)
    if classes is not None:
        raise UsageError("--classes goes with --shape; a data set knows its own classes.")
    spec = dataset or "digits"
    known = known_look(spec)
    if known is not None:
        return known
    from fedkit.data.datasets import open_dataset

    allow(spec)
    opened = open_dataset(spec, build(DataSettings, settings))
    return Look(opened.train.shape, len(opened.classes), tokens=not len(opened.train.mean))


def model_rows(look: Look) -> list[dict[str, Any]]:
    """One row for each network: its cost on such data, or under ``refused`` why it can't read them."""
    rows: list[dict[str, Any]] = []
    for name in names("models"):
        about, small = _documented(load("models", name))
        row: dict[str, Any] = {"name": name, "about": about, "small_images": small}
        rows.append(row | _figures(name, look))
    return rows


def print_models(rows: list[dict[str, Any]], look: Look) -> None:
    """What there is, a line each, and what each costs, as a table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fedkit.report import size, wide_console

    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['about']}")
    shape = "x".join(str(number) for number in look.shape)
    table = Table(title=f"\nOn data of {shape} with {look.classes} classes", box=box.HORIZONTALS)
    for column in ("model", "parameters", "multiply-adds", "bytes"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    table.add_column("small images")
    for row in rows:
        figures = ["-", "-", "-"]
        if "refused" not in row:
            numbers = (row["parameters"], row["multiply_adds"])
            figures = [*(f"{number:,}" for number in numbers), size(row["bytes"])]
        table.add_row(
            row["name"], *figures, escape(row.get("refused") or row["small_images"] or "")
        )
    wide_console().print(table)


def _figures(name: str, look: Look) -> dict[str, Any]:
    from dataclasses import asdict

    from fedkit.models.cost import cost

    refused = ""
    for tokens in (False, True) if look.tokens is None else (look.tokens,):
        try:
            return asdict(cost(name, look.shape, look.classes, tokens=tokens))
        except FedkitError as error:
            refused = str(error)
    return {"refused": refused}


def _documented(factory: Any) -> tuple[str, str | None]:
    lines = (inspect.getdoc(factory) or "").splitlines()
    small = [line for line in lines if line.startswith(SMALL_IMAGES)]
    about = lines[0] if lines else ""
    return about, small[0].removeprefix(SMALL_IMAGES) if small else None


def _sizes(text: str) -> tuple[int, ...]:
    words = text.lower().split("x")
    if len(words) not in (1, 3) or not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(
            f"--shape takes CHANNELSxHEIGHTxWIDTH, as in 3x32x32, or one number of features or tokens, "
            f"not {text!r}."
        )
    return tuple(int(word) for word in words)
