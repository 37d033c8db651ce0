"""Selectors that prefer clients from which much is to be learned: power-of-choice and Oort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedkit.engine.roster import Member
from fedkit.engine.selection import Seen, View
from fedkit.errors import UsageError
from strategies.selectors import arguments
from strategies.selectors.plain import BeforeTraining

# Oort's paper, section 4.2 and 7.1: exploration starts at 0.9 and shrinks by 0.98 a round to 0.2.
FIRST_EXPLORATION, SHRINK, LAST_EXPLORATION = 0.9, 0.98, 0.2
PENALTY = 2.0
CONFIDENCE = 0.1


class PowerOfChoice(BeforeTraining):
    """power:D[,M]: the M clients with the highest loss among D candidates drawn by samples (M: D/2).

    Cho, Wang & Joshi 2020 (arXiv 2010.01243): candidates without replacement, with probability
    proportional to n_k; of these the highest local loss. A client's loss is that of its last training
    (the paper's rpow-d, which sends nothing extra); one that has told none comes first. With M = D the
    losses do not matter, and with D >= N neither does the draw.
    """

    def __init__(self, argument: str | None) -> None:
        first, comma, second = (argument or "").partition(",")
        self._candidates = arguments.count("power", first or None)
        self._count = (
            arguments.count("power", second.strip()) if comma else max(self._candidates // 2, 1)
        )
        if self._count > self._candidates:
            raise UsageError(
                f"power takes {self._count} clients out of {self._candidates} candidates: give the "
                "candidates first, as in power:10,3."
            )

    def choose(self, view: View) -> Sequence[Member]:
        """Drawn, then ranked; of equals the lower number."""
        able = [member for member in view.members if member.examples]
        members = able or list(view.members)
        weights = np.array([max(member.examples, 1) for member in members], dtype=np.float64)
        drawn = view.generator.choice(
            len(members),
            size=min(self._candidates, len(members)),
            replace=False,
            p=weights / weights.sum(),
        )
        candidates = sorted((members[at] for at in drawn), key=lambda member: member.client)
        return sorted(candidates, key=lambda member: -_loss(view, member))[: self._count]


class Oort(BeforeTraining):
    """oort[:M]: M clients by loss times speed, some of them never seen before (M: half of all).

    After Lai et al. 2021 (OSDI, arXiv 2010.06081), section 4: a share epsilon of the M is explored among
    clients that have not told a loss yet, drawn at random; the others have the highest

        U_k = n_k loss_k + range * sqrt(0.1 log t / last_k), times (T / t_k)^2 where t_k > T

    with ``last_k`` the round in which k last took part, t_k what that took with its transfer, ``range``
    that of the n_k loss_k. The loss is a client's mean, where the paper has the root of the mean square
    of each sample's; T is the median of the t_k, where the paper paces it; what it does against
    outliers (clipping, removal after many rounds) is left out. So: Oort-like.
    """

    def __init__(self, argument: str | None) -> None:
        self._count = None if argument is None else arguments.count("oort", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """Explored ones by the round's generator, the others by utility; of equals the lower number."""
        size = min(self._count or max(len(view.members) // 2, 1), len(view.members))
        known = [member for member in view.members if math.isfinite(_loss(view, member))]
        fresh = [member for member in view.members if member not in known]
        exploration = max(FIRST_EXPLORATION * SHRINK ** (view.round - 1), LAST_EXPLORATION)
        explored = min(max(round(exploration * size), size - len(known)), len(fresh))
        drawn = view.generator.permutation(len(fresh))[:explored]
        worth = self._utilities(view, known)
        ranked = sorted(known, key=lambda member: (-worth[member.client], member.client))
        return [*(fresh[at] for at in drawn), *ranked[: size - explored]]

    def _utilities(self, view: View, known: Sequence[Member]) -> dict[int, float]:
        if not known:
            return {}
        seen = {member.client: view.seen[member.client] for member in known}
        gain = {member.client: member.examples * _loss(view, member) for member in known}
        spread = max(gain.values()) - min(gain.values())
        times = {k: part.seconds[-1] + part.transfer_seconds[-1] for k, part in seen.items()}
        wanted = float(np.median(list(times.values())))
        utilities = {}
        for k, part in seen.items():
            stale = math.sqrt(CONFIDENCE * math.log(view.round) / part.rounds[-1])
            slow = (wanted / times[k]) ** PENALTY if times[k] > wanted else 1.0
            utilities[k] = (gain[k] + spread * stale) * slow
        return utilities


def _loss(view: View, member: Member) -> float:
    """The loss of a client's last training; infinite if it has told none that is a number."""
    losses = view.seen.get(member.client, Seen()).losses
    return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf
