"""FedMARL: agents that decide after a probing epoch which clients go on (Zhang et al., AAAI 2022).

In each round all are probed; every client's agent sees what its probe told, and says whether it goes on.
Those stopped send nothing and skip the rest of their epochs. The team is paid for accuracy gained, less
latency and bytes (``reward``), and learns in simulation, or goes on learning online.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, View
from strategies.selectors.agents import Learner, greedy
from strategies.selectors.features import observe
from strategies.selectors.policy import Policy
from strategies.selectors.replay import Transition
from strategies.selectors.reward import Units, gained, saved, team_reward


class FedMARL:
    """The selector; the same policy, views and probes give the same decisions."""

    probes = True

    def __init__(self, policy: Policy, learning: Learning | None = None) -> None:
        """A selector that follows ``policy``, and lets it learn where there is a ``learning``."""
        self._policy = policy
        self._learning = learning
        self._worst_loss = 1.0

    def choose(self, view: View) -> Sequence[Member]:
        """Everybody is probed."""
        return view.members

    def keep(self, view: View, probes: Mapping[int, Probe]) -> Sequence[Member]:
        """Those whose agents value going on at least as much as stopping.

        Never fewer than ``min_keep`` and ``min_share`` of those probed.
        A probe that is missing or whose loss is no number stops its client.
        """
        members = [member for member in view.members if member.client in probes]
        if not members:
            return []
        losses = [probes[member.client].loss for member in members]
        self._worst_loss = max([self._worst_loss, *filter(math.isfinite, losses)])
        policy = self._policy
        raw = observe(view, members, probes, policy.settings.history, self._worst_loss)
        if self._learning is not None:
            policy.standard.take_in(raw)
        values = policy.team.values(policy.standard(raw))
        actions = greedy(values)
        if self._learning is not None:
            actions = self._learning.explore(actions, raw, view.generator)
        actions[~np.isfinite(losses)] = 0
        share = math.ceil(policy.settings.min_share * len(members) - 1e-9)
        _keep_enough(actions, values, losses, max(policy.settings.min_keep, share))
        if self._learning is not None:
            self._learning.act(raw, actions, view)
        return [member for member, action in zip(members, actions, strict=True) if action]

    def learn(self, outcome: Outcome) -> None:
        """Learn from how the round went, if that is wanted."""
        if self._learning is not None:
            self._learning.learn(outcome)

    @property
    def state(self) -> FedMARLState:
        """What the next round's decisions hang on, for the checkpoint."""
        learning = self._learning.remembered() if self._learning is not None else {}
        return FedMARLState(self._worst_loss, learning)

    @state.setter
    def state(self, state: FedMARLState) -> None:
        self._worst_loss = state.worst_loss
        if self._learning is not None and state.learning:
            self._learning.recall(state.learning)


@dataclass
class FedMARLState:
    """What FedMARL carries from round to round.

    Attributes:
        worst_loss: the largest loss that a probe told; stands for one that is no number.
        learning: of agents that learn: networks, optimiser, replay buffer, epsilon, statistics.
    """

    worst_loss: float
    learning: dict[str, Any]


class Learning:
    """How a policy learns from round to round: explores, remembers what it did, is paid, takes steps."""

    def __init__(self, policy: Policy, *, falling: int = 0, units: Units | None = None) -> None:
        """Learning that begins.

        Args:
            policy: changes as it learns.
            falling: rounds in which epsilon falls from 1 to its end; 0: it is there at once.
            units: what latency and bytes are counted in; None: what the first round costs, in which
                everybody goes on.
        """
        self.units = units
        self._policy = policy
        self._learner = Learner(policy.team, policy.standard, policy.settings)
        self._falling = falling
        self._rounds = 0
        self._accuracy = math.nan
        self._everybody: Outcome | None = None
        self._acted: tuple[NDArray[np.float32], NDArray[np.int64], View] | None = None
        # A round's transition waits for what the next one's clients look like.
        self._waiting: tuple[NDArray[np.float32], NDArray[np.int64], float] | None = None

    @property
    def epsilon(self) -> float:
        """How often an agent acts at random now."""
        last = self._policy.settings.epsilon
        left = 1 - self._rounds / self._falling if self._falling else 0.0
        return last + (1 - last) * max(left, 0.0)

    def explore(
        self,
        actions: NDArray[np.int64],
        states: NDArray[np.float32],
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Actions, some of them replaced at random (epsilon-greedy).

        What replaces them is drawn for the round (ours): a share that goes on, the larger of two even
        draws, and either anybody or those that are first, or last, by one of the features. Alone, nobody
        of many slow clients learns that it holds up the round, since the others do so too.
        """
        if self.units is None:
            return np.ones_like(actions)
        tried = generator.random(len(actions)) < self.epsilon
        order = generator.random(len(actions))
        if generator.random() < 0.5:
            order = states[:, generator.integers(states.shape[1])] * generator.choice([-1.0, 1.0])
        share = generator.random(2).max()
        random = order <= np.quantile(order, share)
        return np.where(tried, random, actions).astype(np.int64)

    def act(self, states: NDArray[np.float32], actions: NDArray[np.int64], view: View) -> None:
        """Take note of what was seen and done; the round before is whole now."""
        self._store(states)
        self._acted = states, actions, view
        self._rounds += 1

    def compare(self, everybody: Outcome) -> None:
        """Take note of what the round would have come to if everybody had gone on."""
        self._everybody = everybody

    def learn(self, outcome: Outcome) -> None:
        """Be paid for the round, and take steps; what is drawn for them is the round's generator's.

        A round teaches nothing if nobody decided in it, or if its accuracy or that of the round before was
        not measured.
        """
        before, smoothing = self._accuracy, self._policy.settings.smoothing
        self._accuracy = outcome.accuracy
        if math.isfinite(before):
            self._accuracy += smoothing * (before - outcome.accuracy)
        acted, self._acted = self._acted, None
        everybody, self._everybody = self._everybody, None
        if acted is None:
            return
        states, actions, view = acted
        if self.units is None:
            if outcome.seconds > 0 and outcome.bytes_up > 0:
                self.units = Units(outcome.seconds, outcome.bytes_up)
        elif everybody is not None:
            reward = self._beside(outcome, everybody, view)
            self._waiting = states, actions, reward
        elif math.isfinite(before) and math.isfinite(outcome.accuracy):
            smoothed = replace(outcome, accuracy=self._accuracy)
            reward = team_reward(smoothed, before, self.units, self._policy.objective)
            self._waiting = states, actions, reward
        self._learner.learn(view.generator)

    def end(self) -> None:
        """The federation is over: nothing follows the last round, and another may begin."""
        self._store(np.empty((0, len(self._policy.standard.mean)), dtype=np.float32))
        self._accuracy = math.nan
        self._acted = None

    def remembered(self) -> dict[str, Any]:
        """Everything that it goes on from, for a checkpoint."""
        standard = self._policy.standard
        waiting = self._waiting or (None, None, None)
        return {
            "units": [self.units.seconds, self.units.size] if self.units else [],
            "rounds": self._rounds,
            "accuracy": self._accuracy,
            "waiting": list(waiting),
            "standard": [standard.count, standard.mean.copy(), standard.squares.copy()],
            "learner": self._learner.remembered(),
        }

    def recall(self, values: dict[str, Any]) -> None:
        """Go on from what ``remembered`` gave."""
        self.units = Units(*values["units"]) if values["units"] else None
        self._rounds = values["rounds"]
        self._accuracy = values["accuracy"]
        states, actions, reward = values["waiting"]
        self._waiting = None if states is None else (states, actions, reward)
        standard = self._policy.standard
        standard.count, standard.mean, standard.squares = values["standard"]
        self._learner.recall(values["learner"])

    def _beside(self, outcome: Outcome, everybody: Outcome, view: View) -> float:
        """What the round is paid beside the same one in which everybody goes on."""
        policy, units = self._policy, self.units
        assert units is not None
        lasting = policy.settings.fading ** max(view.rounds - view.round, 0)
        gain = lasting * gained(outcome, everybody, policy.objective)
        return gain + saved(outcome, everybody, units, policy.objective)

    def _store(self, following: NDArray[np.float32]) -> None:
        if self._waiting is not None:
            self._learner.replay.add(Transition(*self._waiting, following))
        self._waiting = None


def _keep_enough(
    actions: NDArray[np.int64],
    values: NDArray[np.float32],
    losses: Sequence[float],
    least: int,
) -> None:
    """Where fewer than ``least`` would go on, those with the largest Q1 - Q0 do, in place."""
    if actions.sum() >= least:
        return
    # A loss that is no number is the last resort.
    preferred = np.where(np.isfinite(losses), values[:, 1] - values[:, 0], -np.inf)
    preferred = np.where(actions == 1, np.inf, preferred)
    actions[np.argsort(-preferred, kind="stable")[:least]] = 1
