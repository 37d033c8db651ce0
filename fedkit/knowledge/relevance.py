"""Relevance: whether an update goes the way that the federation goes (CMFL, Wang et al., ICDCS 2019).

e(u, v) is the share of coordinates in which the signs of a client's update u and of the last global
update v agree; 0 agrees with 0 alone. A client whose e is below the threshold does not send its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import UsageError


@dataclass(frozen=True)
class Threshold:
    """The least agreement with which an update is sent.

    Attributes:
        start: v_0, 0 to 1; with 0 everything is sent.
        falls: whether it is v_0 / sqrt(t) in round t = 1, 2, ..., else v_0 in every round.
    """

    start: float
    falls: bool = False

    def at(self, server_round: int) -> float:
        """v_t."""
        return self.start / math.sqrt(server_round) if self.falls else self.start


def read_threshold(spec: str) -> Threshold | None:
    """The threshold in ``0.8`` or ``0.8,decay``; None for no filter (an empty text).

    Raises:
        UsageError: it is neither.
    """
    if not spec:
        return None
    number, comma, word = spec.partition(",")
    try:
        start = float(number)
    except ValueError:
        start = math.nan
    if not 0 <= start <= 1 or (comma and word.strip() != "decay"):
        raise UsageError(
            f"relevance must be a share from 0 to 1, as in 0.8 or 0.8,decay, not {spec!r}."
        )
    return Threshold(start, bool(comma))


def agreement(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """e(u, v) over pairs of tensors of u and v; 1 where there are no coordinates."""
    same = count = 0
    for ours, theirs in pairs:
        same += int(np.count_nonzero(np.sign(ours) == np.sign(theirs)))
        count += ours.size
    return same / count if count else 1.0
