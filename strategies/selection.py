"""Selectors: who takes part in a round. ``(members, argument, generator) -> members``."""

from __future__ import annotations

import numpy as np

from fedkit.engine.roster import Member
from fedkit.errors import UsageError


def everyone(
    members: list[Member], argument: str | None, generator: np.random.Generator
) -> list[Member]:
    """all: every client that is connected."""
    if argument is not None:
        raise UsageError("the selector all takes no argument.")
    return members


def uniform(
    members: list[Member], argument: str | None, generator: np.random.Generator
) -> list[Member]:
    """uniform:F: a share F of the clients, at least one, drawn without replacement (FedAvg's rule)."""
    try:
        share = float(argument or "")
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"uniform takes a share, as in uniform:0.1, not {argument!r}.")
    count = max(int(share * len(members)), 1)
    chosen = generator.choice(len(members), size=count, replace=False)
    return [members[at] for at in chosen]
