"""What the readers of data sets give besides samples: where they found them, for `fedkit data check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedkit.data.samples import DataSet
from fedkit.errors import UsageError


@dataclass(frozen=True)
class Found(DataSet):
    """A data set that came from files.

    Attributes:
        files: the files, or the folder of many.
        checksums: what became of comparing them with published ones.
        notes: what was passed over, in sentences for people.
    """

    files: tuple[Path, ...] = ()
    checksums: str = "none are published"
    notes: tuple[str, ...] = ()


def refuse_argument(name: str, argument: str | None) -> None:
    """Raise ``UsageError`` where a data set without arguments was given one."""
    if argument is not None:
        raise UsageError(f"The data set {name} takes no argument, not {name}:{argument}.")
