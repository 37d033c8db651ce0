"""Non-uniform participation: clients drawn with given weights, or by their samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkit.engine.roster import Member
from fedkit.engine.selection import View
from fedkit.errors import UsageError
from strategies.selectors import arguments
from strategies.selectors.plain import BeforeTraining

# Ours.
SHARE = 0.5


class Weighted(BeforeTraining):
    """weighted[:F][,CLIENT=WEIGHT...]: a share F (0.5) of the clients, drawn by weight, else by samples.

    max(floor(F N), 1) of the N connected clients are drawn one after the other without replacement, each
    time with probability q_k = v_k / sum v of those that are left: v_k is the number of samples n_k, or,
    where weights are given as in ``weighted:0.3,0=0.5,3=2``, those, and 1 for clients not named. With
    equal weights the distribution is that of ``uniform:F``.

    The objective is then biased, and this says how: what is averaged is sum_k a_k w_k / sum_k a_k over
    those drawn, with the strategy's own a_k, so a client counts in the long run about as its chance of
    being drawn times a_k. By samples under ``weighting=examples`` a large client counts twice over;
    take ``weighting=equal`` (FedAvg) for about n_k/n. The unbiased (n_k/n)/(m q_k) holds for sampling
    with replacement alone (algorithms.md 10), which would have one client train twice.
    """

    def __init__(self, argument: str | None) -> None:
        parts = [part.strip() for part in argument.split(",")] if argument is not None else []
        plain = bool(parts) and "=" not in parts[0]
        self._share = arguments.share("weighted", parts[0]) if plain else SHARE
        self._weights = dict(_weight(part) for part in parts[plain:])

    def choose(self, view: View) -> Sequence[Member]:
        """Drawn by the round's generator; who has no weight is never drawn."""
        members = [member for member in view.members if self._of(member) > 0]
        weights = np.array([self._of(member) for member in members], dtype=np.float64)
        size = min(max(int(self._share * len(view.members)), 1), len(members))
        if not size:
            return []
        chosen = view.generator.choice(
            len(members), size=size, replace=False, p=weights / weights.sum()
        )
        return [members[at] for at in chosen]

    def _of(self, member: Member) -> float:
        if self._weights:
            return self._weights.get(member.client, 1.0)
        return float(member.examples)


def _weight(part: str) -> tuple[int, float]:
    client, _, text = part.partition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not client.isdecimal() or not 0 <= weight < np.inf:
        raise UsageError(
            "weighted takes a share and weights of clients by number, as in weighted:0.3,0=0.5,3=2, not "
            f"{part!r}."
        )
    return int(client), weight
