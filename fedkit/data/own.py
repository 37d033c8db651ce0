"""No data at the server: its clients bring their own, and it only names the classes."""

from __future__ import annotations

import torch

from fedkit.data.samples import DataSet, Form, pool_of
from fedkit.errors import UsageError
from fedkit.settings import DataSettings


def own(argument: str | None, sources: DataSettings, form: Form | None = None) -> DataSet:
    """The clients' own data: own:cat,dog,bird names the classes, --public how samples look.

    It has no samples; how clients' own are normalised is taken from the public set (``splits.cut``).
    """
    classes = tuple(name.strip() for name in (argument or "").split(","))
    if len(classes) < 2 or "" in classes or len(set(classes)) < len(classes):
        raise UsageError(
            "own takes the names of two or more different classes, as in own:cat,dog,bird, not "
            f"{argument or 'nothing'!r}."
        )
    if form is None:
        raise UsageError(
            f"own:{argument} holds nothing: it names the classes of data that clients bring, and how "
            "these look is told by the public set of a federation."
        )
    data = torch.empty((0, *form.shape), dtype=torch.uint8)
    scaled = 0 if form.tokens else form.shape[0]
    empty = pool_of(
        data, torch.empty(0, dtype=torch.int64), torch.zeros(scaled), torch.ones(scaled)
    )
    return DataSet(f"own:{argument}", empty, empty, classes, form.columns)
