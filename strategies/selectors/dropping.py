"""Random dropping: what a selector that decides after a probe is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, View
from strategies.selectors import arguments


class Drop:
    """drop:F: everyone is probed, then a share F of them stops early, at random.

    floor(F N) of the N that answered the probe, drawn without replacement, and never all: the control
    for a selector that stops as many, but knows why. With F below 1/N this is ``all``, with a probe.
    """

    probes = True

    def __init__(self, argument: str | None) -> None:
        self._share = arguments.share("drop", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """All."""
        return view.members

    def keep(self, view: View, probes: Mapping[int, Probe]) -> Sequence[Member]:
        """Drawn by the round's generator."""
        members = view.members
        size = max(len(members) - int(self._share * len(members)), 1)
        kept = view.generator.choice(len(members), size=size, replace=False)
        return [members[at] for at in kept]

    def learn(self, outcome: Outcome) -> None:
        """Nothing."""
