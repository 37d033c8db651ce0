"""Tables: numbers in CSV files with a header, and a column that says the class."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkit.data.found import Found
from fedkit.data.places import own_path
from fedkit.data.samples import Form, Pool, pool_of
from fedkit.errors import FedkitError, UsageError
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings

LABELS = ("label", "class", "target")
# So many rows are text at a time.
BLOCK = 4096


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read: the features in this order, and the label's if there is one."""

    features: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class Rows:
    """What a file holds: numbers (float32, n x d) and the label's texts (n, or empty)."""

    numbers: NDArray[np.float32]
    labels: list[str]


def table(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """Tables: csv:PATH[,label=COLUMN], numbers with a header; PATH is a file or a folder.

    A folder holds ``train.csv`` and ``test.csv``; of a file a fixed fifth of the rows is the test set,
    the same for every seed. The class stands in the column named, else in ``label``, ``class`` or
    ``target``, else in the last; ``label=`` with nothing: there is none, for a public set. Features are
    standardised by the training rows' mean and standard deviation. Where a federation has columns
    already, these are read, in its order.
    """
    spec = f"csv:{argument or ''}"
    path, comma, label = (argument or "").partition(",label=")
    place = own_path(spec, path, sources)
    files = [place / "train.csv", place / "test.csv"] if place.is_dir() else [place]
    wanted = form.columns if form is not None else ()
    columns = _columns(files[0], wanted, label if comma else None)
    parts = [_read(file, columns) for file in files]
    train, test = parts if len(parts) == 2 else _cut(parts[0])
    names = set(train.labels) | set(test.labels)
    classes = sorted(names, key=_in_order) if _all_numbers(names) else sorted(names)
    mean, std = _moments(train.numbers)
    return Found(
        spec,
        _pool(train, classes, mean, std),
        _pool(test, classes, mean, std),
        tuple(classes),
        columns.features,
        files=tuple(files),
    )


def _columns(file: Path, wanted: tuple[str, ...], label: str | None) -> Columns:
    header = next(_rows(file))[1]
    _check_header(file, header)
    if label is None:
        named = [name for name in header if name in LABELS and name not in wanted]
        if len(named) > 1:
            raise UsageError(
                f"{file} has the columns {' and '.join(named)}: say which is the class, as in "
                f"csv:PATH,label={named[0]}."
            )
        last = header[-1] if header[-1] not in wanted else None
        chosen = named[0] if named else last
    else:
        chosen = label or None
        if chosen is not None and chosen not in header:
            raise UsageError(f"{file} has no column {label!r}; it has {', '.join(header)}.")
    missing = [name for name in wanted if name not in header or name == chosen]
    if missing:
        raise FedkitError(
            f"{file} has no feature {missing[0]!r}, which this federation's networks read; it has "
            f"{', '.join(name for name in header if name != chosen)}."
        )
    features = wanted or tuple(name for name in header if name != chosen)
    if not features:
        hint = "; columns are separated by commas" if ";" in header[0] or "\t" in header[0] else ""
        raise FedkitError(f"{file} has no column but {header[0]!r}{hint}.")
    return Columns(features, chosen)


def _check_header(file: Path, header: list[str]) -> None:
    if "" in header:
        raise FedkitError(f"{file}, line 1: column {header.index('') + 1} has no name.")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise FedkitError(f"{file}, line 1: there are two columns named {twice[0]!r}.")
    if _all_numbers(set(header)):
        raise FedkitError(f"{file}, line 1 must name the columns; it has numbers.")


def _read(file: Path, columns: Columns) -> Rows:
    rows = _rows(file)
    header = next(rows)[1]
    _check_header(file, header)
    needed = [*columns.features, *([columns.label] if columns.label else [])]
    for name in needed:
        if name not in header:
            raise FedkitError(f"{file} has no column {name!r}; it has {', '.join(header)}.")
    features = [header.index(name) for name in columns.features]
    at = header.index(columns.label) if columns.label else None
    numbers, labels = list[NDArray[np.float32]](), list[str]()
    block = list[tuple[int, list[str]]]()
    for line, row in rows:
        if at is not None and not row[at]:
            raise FedkitError(f"{file}, line {line}: the column {columns.label} is empty.")
        block.append((line, row))
        labels.extend([row[at]] if at is not None else [])
        if len(block) == BLOCK:
            numbers.append(_numbers(file, block, features, header))
            block = []
    numbers.append(_numbers(file, block, features, header))
    every = np.concatenate(numbers)
    if not len(every):
        raise FedkitError(f"{file} has a header and no rows.")
    return Rows(every, labels)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the header and of every row."""
    reader, width = None, 0
    if file.exists() and not file.is_file():
        raise FedkitError(f"{file} is no file of text.")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, skipinitialspace=True, strict=True)
            for row in reader:
                if not row:
                    continue
                cells = [cell.strip() for cell in row]
                width = width or len(cells)
                if len(cells) != width:
                    raise FedkitError(
                        f"{file}, line {reader.line_num} has {len(cells)} cells, the header {width}."
                    )
                yield reader.line_num, cells
    except FileNotFoundError as error:
        raise FedkitError(f"There is no {file}.") from error
    except OSError as error:
        raise FedkitError(f"{file} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = _line_that_is_no_text(file)
        raise FedkitError(f"{file}, line {line} is no UTF-8: save the table as UTF-8.") from error
    except csv.Error as error:
        line = reader.line_num if reader else 1
        raise FedkitError(f"{file}, line {line} is no CSV: {error}.") from error
    if not width:
        raise FedkitError(f"{file} is empty.")


def _line_that_is_no_text(file: Path) -> int:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _numbers(
    file: Path, block: list[tuple[int, list[str]]], features: list[int], header: list[str]
) -> NDArray[np.float32]:
    texts = [[row[at] for at in features] for _, row in block]
    try:
        with np.errstate(over="ignore"):
            values = np.array(texts, dtype=np.float64).reshape(-1, len(features)).astype(np.float32)
    except ValueError:
        values = None
    if values is not None and np.isfinite(values).all():
        return values
    for line, row in block:
        for at in features:
            if not row[at]:
                raise FedkitError(f"{file}, line {line}: the column {header[at]} is empty.")
            if not _is_number(row[at]):
                raise FedkitError(
                    f"{file}, line {line}: {row[at][:40]!r} in the column {header[at]} is no number that "
                    "float32 can hold."
                )
    raise AssertionError("a block of numbers can't be read and has no cell that can't")


def _is_number(text: str) -> bool:
    try:
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(float(text))))
    except ValueError:
        return False


def _all_numbers(names: set[str]) -> bool:
    return all(_is_number(name) for name in names)


def _in_order(name: str) -> tuple[float, str]:
    return float(name), name


def _cut(rows: Rows) -> tuple[Rows, Rows]:
    """A fixed fifth of the rows apart."""
    count = len(rows.numbers)
    order = numpy_generator(0, "csv test split").permutation(count)
    # Without labels nothing can be measured: all is training data.
    apart = np.sort(order[: round(count / 5) if rows.labels else 0])
    kept = np.setdiff1d(np.arange(count), apart)

    def part(chosen: NDArray[np.int64]) -> Rows:
        labels = [rows.labels[at] for at in chosen] if rows.labels else []
        return replace(rows, numbers=rows.numbers[chosen], labels=labels)

    return part(kept), part(apart)


def _moments(numbers: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    mean, std = numbers.mean(axis=0, dtype=np.float64), numbers.std(axis=0, dtype=np.float64)
    # A column that never changes says nothing: it becomes zeros.
    std = np.where(std > 0, std, 1.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def _pool(rows: Rows, classes: list[str], mean: Tensor, std: Tensor) -> Pool:
    number = {name: at for at, name in enumerate(classes)}
    labels = [number[name] for name in rows.labels] or [0] * len(rows.numbers)
    return pool_of(
        torch.from_numpy(rows.numbers), torch.tensor(labels, dtype=torch.int64), mean, std
    )
