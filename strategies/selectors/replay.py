"""The replay buffer: rounds as the agents saw them, for any number of clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Transition:
    """One round.

    Attributes:
        states: features of its n clients, n x f, not standardised.
        actions: what was done, int64, n: 1 goes on, 0 stops.
        reward: the team's.
        following: features of the next round's n' clients; those of none after the last round.
    """

    states: Rows
    actions: NDArray[np.int64]
    reward: float
    following: Rows


@dataclass(frozen=True)
class Batch:
    """Some rounds side by side, filled up to the largest number of clients N.

    Attributes:
        states: B x N x f, actions: int64, B x N, there: which are clients (bool, B x N).
        rewards: float32, B.
        following: B x N' x f, following_there: bool, B x N' (all false after a last round).
    """

    states: Rows
    actions: NDArray[np.int64]
    there: NDArray[np.bool_]
    rewards: Rows
    following: Rows
    following_there: NDArray[np.bool_]


class Replay:
    """The last ``capacity`` rounds."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rounds: list[Transition] = []
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._rounds)

    def add(self, transition: Transition) -> None:
        """Remember a round; the oldest is forgotten where there is no room."""
        if len(self._rounds) < self._capacity:
            self._rounds.append(transition)
            return
        self._rounds[self._oldest] = transition
        self._oldest = (self._oldest + 1) % self._capacity

    def sample(self, count: int, generator: np.random.Generator) -> Batch:
        """So many rounds, drawn with replacement."""
        drawn = [self._rounds[at] for at in generator.integers(len(self._rounds), size=count)]
        states, there = _side_by_side([each.states for each in drawn])
        following, following_there = _side_by_side([each.following for each in drawn])
        actions = np.zeros(there.shape, dtype=np.int64)
        for row, each in enumerate(drawn):
            actions[row, : len(each.actions)] = each.actions
        rewards = np.array([each.reward for each in drawn], dtype=np.float32)
        return Batch(states, actions, there, rewards, following, following_there)

    def remembered(self) -> dict[str, Any]:
        """All of it as a few arrays, for a checkpoint."""
        rounds = self._rounds[self._oldest :] + self._rounds[: self._oldest]
        return {
            "counts": np.array([len(each.states) for each in rounds], dtype=np.int64),
            "following_counts": np.array([len(each.following) for each in rounds], dtype=np.int64),
            "states": _end_to_end([each.states for each in rounds]),
            "following": _end_to_end([each.following for each in rounds]),
            "actions": np.concatenate([np.empty(0, np.int64), *(each.actions for each in rounds)]),
            "rewards": np.array([each.reward for each in rounds], dtype=np.float64),
        }

    def recall(self, values: dict[str, Any]) -> None:
        """Take what ``remembered`` gave in the place of what is here."""
        cuts, following_cuts = (
            np.cumsum(values[name])[:-1] for name in ("counts", "following_counts")
        )
        parts = zip(
            np.split(values["states"], cuts),
            np.split(values["actions"], cuts),
            values["rewards"].tolist(),
            np.split(values["following"], following_cuts),
            strict=True,
        )
        self._rounds = [Transition(*part) for part in parts] if len(values["counts"]) else []
        self._oldest = 0


def _side_by_side(rows: list[Rows]) -> tuple[Rows, NDArray[np.bool_]]:
    most = max(len(each) for each in rows)
    filled = np.zeros((len(rows), most, rows[0].shape[1]), dtype=np.float32)
    there = np.zeros((len(rows), most), dtype=np.bool_)
    for at, each in enumerate(rows):
        filled[at, : len(each)] = each
        there[at, : len(each)] = True
    return filled, there


def _end_to_end(rows: list[Rows]) -> Rows:
    return np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.float32)
