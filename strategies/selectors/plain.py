"""Selectors that ask for nothing but who is there: all, uniform at random, in turn, and by tag."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, Seen, View
from fedkit.errors import FedkitError, UsageError
from strategies.selectors import arguments


class BeforeTraining:
    """A selector that decides before the round, without a probe, and learns nothing."""

    probes = False

    def keep(self, view: View, probes: Mapping[int, Probe]) -> Sequence[Member]:
        """Everybody: it has chosen already."""
        return view.members

    def learn(self, outcome: Outcome) -> None:
        """Nothing."""


class Everyone(BeforeTraining):
    """all: every client that is connected."""

    needs_facts = False

    def __init__(self, argument: str | None) -> None:
        arguments.refuse("all", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """All."""
        return view.members


class Uniform(BeforeTraining):
    """uniform:F: a share F of the clients, uniform:K: K of them, drawn without replacement (FedAvg's rule).

    max(floor(F N), 1) of the N that are connected (McMahan et al. 2017, algorithm 1), or K, a whole number
    above 1; all, if there are fewer. With F = 1 this is ``all``.
    """

    needs_facts = False

    def __init__(self, argument: str | None) -> None:
        self._wanted = arguments.share_or_count("uniform", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """Drawn by the round's generator."""
        members = view.members
        size = self._wanted if self._wanted > 1 else max(int(self._wanted * len(members)), 1)
        size = min(int(size), len(members))
        chosen = view.generator.choice(len(members), size=size, replace=False)
        return [members[at] for at in chosen]


class RoundRobin(BeforeTraining):
    """round-robin:K: the K clients whose turn was longest ago; new ones first, then by number."""

    needs_facts = False

    def __init__(self, argument: str | None) -> None:
        self._count = arguments.count("round-robin", argument)

    def choose(self, view: View) -> Sequence[Member]:
        """A turn counts whether the client answered or not, so that a dead one holds up nobody."""

        def turn(member: Member) -> tuple[int, int]:
            seen = view.seen.get(member.client, Seen())
            return max((*seen.rounds, *seen.missed, *seen.rejected), default=0), member.client

        return heapq.nsmallest(self._count, view.members, key=turn)


class Tagged(BeforeTraining):
    """tag:NAME[,NAME]: the clients with one of these tags (`fedkit client --tag NAME`)."""

    def __init__(self, argument: str | None) -> None:
        self._tags = [tag.strip() for tag in (argument or "").split(",") if tag.strip()]
        if not self._tags:
            raise UsageError("tag takes the name of a tag, as in tag:lab or tag:lab,field.")

    def choose(self, view: View) -> Sequence[Member]:
        """Those that have one; a tag that nobody has is warned of.

        Raises:
            FedkitError: nobody has any of them.
        """
        there = {tag for member in view.members for tag in member.tags}
        known = f"the tags of those that are connected: {', '.join(sorted(there)) or 'none'}"
        missing = [tag for tag in self._tags if tag not in there]
        if len(missing) == len(self._tags):
            raise FedkitError(f"no client has the tag {' or '.join(missing)} ({known})")
        for tag in missing:
            view.warn(f"no client has the tag {tag} ({known})")
        return [member for member in view.members if set(member.tags) & set(self._tags)]
