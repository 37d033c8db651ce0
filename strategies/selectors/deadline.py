"""FedCS: as many clients as fit into a deadline, by what they are expected to take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedkit.engine.roster import Member
from fedkit.engine.selection import Seen, View
from strategies.selectors import arguments
from strategies.selectors.plain import BeforeTraining


class Deadline(BeforeTraining):
    """deadline:SECONDS: as many clients as are expected to be done by then, picked greedily (FedCS).

    Nishio & Yonetani 2019 (arXiv 1804.08333), algorithm 3: clients train side by side and send one after
    the other over a shared uplink. With Theta the time at which those picked are through, the next pick
    is the client that adds least, t_up + max(0, t_train - Theta); it is taken if that still ends before
    the deadline. A client's times are those of its last round; one that has not been seen yet is taken
    to be like the median of the others, so that everybody has a turn, and before anybody has been seen
    all take part. FedCS's own estimates come from a model of the radio; distribution and aggregation
    count nothing here.
    """

    def __init__(self, argument: str | None) -> None:
        self._seconds = arguments.seconds("deadline", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """Greedily; of equals the one whose turn was longest ago, then the lower number."""
        seen = {member.client: view.seen.get(member.client, Seen()) for member in view.members}
        told = [part for part in seen.values() if part.rounds]
        if not told:
            return view.members
        usual = _median([part.seconds[-1] for part in told])
        sending = _median([part.transfer_seconds[-1] for part in told])

        def times(client: int) -> tuple[float, float]:
            part = seen[client]
            # One that did not answer at all since it was last seen is no faster than the deadline.
            if part.missed and part.missed[-1] > max(part.rounds, default=0):
                return self._seconds, sending
            if not part.rounds:
                return usual, sending
            return part.seconds[-1], part.transfer_seconds[-1]

        left = sorted(view.members, key=lambda m: (max(seen[m.client].rounds, default=0), m.client))
        chosen: list[Member] = []
        through = 0.0
        while left:
            ends = [_end(through, *times(member.client)) for member in left]
            at = min(range(len(left)), key=ends.__getitem__)
            if ends[at] > self._seconds:
                break
            through = ends[at]
            chosen.append(left.pop(at))
        return chosen


def _end(through: float, training: float, sending: float) -> float:
    """When another client is through, if those before it are so at ``through``."""
    return max(through, training) + sending


def _median(values: list[float]) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else 0.0
