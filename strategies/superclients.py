"""Superclients: groups of clients whose classes complement each other (FedSeq, Zaccone et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# By client, an estimate of how often each class occurs in its data (float64, C; sums to 1).
Profiles = Mapping[int, NDArray[np.float64]]


@dataclass
class _Group:
    clients: list[int] = field(default_factory=list)
    samples: int = 0

    def add(self, client: int, samples: int) -> None:
        self.clients.append(client)
        self.samples += samples


def superclients(
    profiles: Profiles, samples: Mapping[int, int], enough: int, most: int
) -> list[list[int]]:
    """Clients dealt greedily to groups that see all classes equally often (the authors' code).

    A group takes the client with the highest ``score`` (the first one where none is above 0) until it has
    ``enough`` samples or the most clients that a group may have. A last group that has too few samples is
    dealt out to the others, the smallest first, as far as these have room.

    Args:
        profiles: of each client.
        samples: of each client.
        enough: samples of a group.
        most: clients of a group.

    Returns:
        The clients of each group, by index; every client is in one.
    """
    left, groups, group = sorted(profiles), list[_Group](), _Group()
    while left:
        profile = _profile(group, profiles, samples)
        scores = [score(profile, profiles[client]) for client in left]
        best = int(np.argmax(scores))
        client = left.pop(best if scores[best] > 0 else 0)
        group.add(client, samples[client])
        if group.samples >= enough or len(group.clients) >= most:
            groups.append(group)
            group = _Group()
    if group.clients:
        _deal_out(group, groups, samples, most)
    return [sorted(one.clients) for one in groups]


def score(group: NDArray[np.float64], client: NDArray[np.float64]) -> float:
    """1 - KL((group + client) / 2 || uniform), of two class distributions (float64, C)."""
    mean = (group + client) / 2
    held = mean[mean > 0]
    return float(1 - np.sum(held * np.log(held * len(mean))))


def _profile(group: _Group, profiles: Profiles, samples: Mapping[int, int]) -> NDArray[np.float64]:
    """A group's class distribution: its clients', weighted by samples; uniform for an empty one."""
    if not group.samples:
        classes = len(next(iter(profiles.values())))
        return np.full(classes, 1 / classes)
    mine = (profiles[client] * (samples[client] / group.samples) for client in group.clients)
    whole: NDArray[np.float64] = np.sum(list(mine), axis=0)
    return whole


def _deal_out(rest: _Group, groups: list[_Group], samples: Mapping[int, int], most: int) -> None:
    room = [one for one in sorted(groups, key=lambda one: one.samples) if len(one.clients) < most]
    at = 0
    while rest.clients and room:
        group = room[at % len(room)]
        client = rest.clients.pop()
        group.add(client, samples[client])
        if len(group.clients) >= most:
            room.remove(group)
        else:
            at += 1
    if rest.clients:
        groups.append(rest)
