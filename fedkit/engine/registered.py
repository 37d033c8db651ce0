"""Clients that are registered and need not be alive: each joins when it is first chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fedkit.engine.by_rule import ByRule

if TYPE_CHECKING:
    from fedkit.engine.roster import Member


class Registered(ByRule["Member"]):
    """All clients, in client order.

    Who has joined is what it told; of the others a rule tells what is known before: number and network.
    """

    def __init__(self, rule: Sequence[Member], joined: Mapping[int, Member]) -> None:
        """All clients of ``rule``, of whom ``joined`` (by node id) have told what they are."""
        super().__init__(len(rule), self._now)
        self._rule, self._joined = rule, joined

    def _now(self, number: int) -> Member:
        member = self._rule[number]
        return self._joined.get(member.node_id, member)

    def joined(self) -> list[Member]:
        """Those that have joined, in client order."""
        return sorted(self._joined.values(), key=lambda member: member.client)


@runtime_checkable
class JoinsWhenChosen(Protocol):
    """A grid that may have clients which join when they are first chosen; it answers at once."""

    @property
    def registered(self) -> Sequence[Member] | None:
        """What is known of its clients before they join; None: all of them join first."""
        ...


def among(members: Sequence[Member], clients: Collection[int]) -> list[Member]:
    """The members with these numbers, in client order."""
    if isinstance(members, Registered):
        there = range(len(members))
        return [members[client] for client in sorted(clients) if client in there]
    return [member for member in members if member.client in clients]


def joined(members: Sequence[Member]) -> Sequence[Member]:
    """Those of them that have joined: all, unless they are registered only."""
    return members.joined() if isinstance(members, Registered) else members
