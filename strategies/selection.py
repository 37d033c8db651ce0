"""Selectors: who takes part in a round.

A selector's argument (``0.1`` in ``uniform:0.1``) makes a function from the connected members and the
round's generator to those who take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fedkit.engine.roster import Member
from fedkit.errors import UsageError

Select: TypeAlias = Callable[[list[Member], np.random.Generator], list[Member]]


def everyone(argument: str | None) -> Select:
    """all: every client that is connected."""
    if argument is not None:
        raise UsageError("The selector all takes no argument.")
    return lambda members, generator: members


def uniform(argument: str | None) -> Select:
    """uniform:F: a share F of the clients, at least one, drawn without replacement (FedAvg's rule)."""
    try:
        share = float(argument or "")
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"uniform takes a share, as in uniform:0.1, not {argument!r}.")

    def select(members: list[Member], generator: np.random.Generator) -> list[Member]:
        count = max(int(share * len(members)), 1)
        chosen = generator.choice(len(members), size=count, replace=False)
        return [members[at] for at in chosen]

    return select
