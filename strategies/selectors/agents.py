"""The agents: one network that all share, how their values make the team's, and how they learn.

Agent n values stopping and going on by Q_n(s_n, .) from a two-layer perceptron; since all share its
weights, it serves any number of clients. The team's value is their sum (VDN, Sunehag et al. 2018), or a
function that rises with each (QMIX, Rashid et al. 2018); either way the best joint action is what each
agent likes best. Learning is double Q-learning (van Hasselt et al. 2016) on the team's value.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkit.seeds import torch_generator
from strategies.selectors.features import Standard
from strategies.selectors.fedmarl_settings import FedMARLSettings
from strategies.selectors.replay import Batch, Replay

MIXED = 32


class Agent(nn.Module):
    """Q(s, .): features -> hidden -> 2 values, of stopping and of going on."""

    def __init__(self, features: int, hidden: int, generator: torch.Generator) -> None:
        """A network whose last layer is 0: it values everything alike, and so drops nobody."""
        super().__init__()
        self.first = _linear(features, hidden, generator)
        self.last = nn.Linear(hidden, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Any leading shape x features -> the same shape x 2."""
        values: Tensor = self.last(torch.relu(self.first(states)))
        return values


class Sum(nn.Module):
    """VDN: Q_tot = sum_n Q_n."""

    def forward(self, chosen: Tensor, states: Tensor, there: Tensor) -> Tensor:
        """The team's value, B.

        Args:
            chosen: Q_n of what each agent does, B x N.
            states: what it sees, B x N x features.
            there: which of the N are clients, B x N.
        """
        total: Tensor = (chosen * there).sum(dim=1)
        return total


class Mixer(nn.Module):
    """QMIX: Q_tot = |w(g)| . elu(sum_n |W(g, s_n)| Q_n + b(g)) + v(g), g the mean of all s_n.

    The weights come from hyper-networks and are never negative, so Q_tot rises with each Q_n. That they
    see an agent's own features, so that any number of agents can be mixed, is ours.
    """

    def __init__(self, features: int, generator: torch.Generator) -> None:
        """A mixer with random weights."""
        super().__init__()
        self.inner = _linear(2 * features, MIXED, generator)
        self.bias = _linear(features, MIXED, generator)
        self.outer = _linear(features, MIXED, generator)
        self.level = _linear(features, 1, generator)

    def forward(self, chosen: Tensor, states: Tensor, there: Tensor) -> Tensor:
        """As ``Sum``."""
        present = there[..., None].to(states.dtype)
        everyone = (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        beside = torch.cat([everyone[:, None].expand_as(states), states], dim=2)
        weights = self.inner(beside).abs() * present
        inside = nn.functional.elu((weights * chosen[..., None]).sum(dim=1) + self.bias(everyone))
        total: Tensor = (self.outer(everyone).abs() * inside).sum(dim=1)
        level: Tensor = self.level(everyone)[:, 0]
        return total + level


class Team(nn.Module):
    """All agents and what makes a team of them."""

    def __init__(self, settings: FedMARLSettings, features: int, seed: int) -> None:
        """A team that drops nobody yet."""
        super().__init__()
        generator = torch_generator(seed, "agents")
        self.agent = Agent(features, settings.hidden, generator)
        self.mixer = Mixer(features, generator) if settings.mixing == "qmix" else Sum()

    def values(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Q_n of stopping and going on (float32, n x 2) for standardised features."""
        with torch.no_grad():
            values: NDArray[np.float32] = self.agent(torch.from_numpy(states)).numpy()
        return values

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """All weights by name."""
        return {name: tensor.numpy().copy() for name, tensor in self.state_dict().items()}

    def take(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Take weights; ``KeyError`` or ``ValueError`` where they do not fit."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: arrays[name].shape for name in wanted}
        if found != wanted or any(arrays[name].dtype != np.float32 for name in wanted):
            raise ValueError(f"its arrays are {found}, not {wanted}")
        self.load_state_dict({name: torch.from_numpy(arrays[name].copy()) for name in wanted})


class Learner:
    """Teaches a team by what it has been through (double DQN on the team's value)."""

    def __init__(self, team: Team, standard: Standard, settings: FedMARLSettings) -> None:
        self.replay = Replay(settings.capacity)
        self._team = team
        self._target = copy.deepcopy(team)
        self._standard = standard
        self._settings = settings
        self._steps = 0
        # One pass over memory instead of several.
        parameters = list(team.parameters())
        self._optimiser = torch.optim.Adam(parameters, lr=settings.agent_rate, fused=True)

    def learn(self, generator: np.random.Generator) -> None:
        """The steps that follow a round, on rounds that ``generator`` draws."""
        if len(self.replay) < self._settings.agent_batch:
            return
        for _ in range(self._settings.updates):
            self.step(self.replay.sample(self._settings.agent_batch, generator))

    def step(self, batch: Batch) -> float:
        """One step of Adam towards y; gives the loss."""
        settings, team = self._settings, self._team
        goal = self.goal(batch)
        states = torch.from_numpy(self._standard(batch.states))
        actions, there = torch.from_numpy(batch.actions), torch.from_numpy(batch.there)
        chosen = team.agent(states).gather(2, actions[..., None])[..., 0]
        whole = team.mixer(chosen, states, there)
        measure = nn.functional.mse_loss if settings.loss == "squared" else _huber
        loss = measure(whole, goal)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(team.parameters(), settings.clip)
        self._optimiser.step()
        self._steps += 1
        self._follow()
        return float(loss.detach())

    def goal(self, batch: Batch) -> Tensor:
        """y = r + gamma Q-_tot(s', the action that the present team likes best), B; r after the last."""
        if not self._settings.discount:
            return torch.from_numpy(batch.rewards)
        with torch.no_grad():
            states = torch.from_numpy(self._standard(batch.following))
            there = torch.from_numpy(batch.following_there)
            best = _going_on(self._team.agent(states))
            valued = self._target.agent(states).gather(2, best[..., None])[..., 0]
            later = self._target.mixer(valued, states, there) * there.any(dim=1)
            goal: Tensor = torch.from_numpy(batch.rewards) + self._settings.discount * later
            return goal

    def remembered(self) -> dict[str, Any]:
        """Everything that the next step hangs on, for a checkpoint."""
        moments: dict[str, Any] = {}
        for at, state in self._optimiser.state_dict()["state"].items():
            moments[str(at)] = {name: tensor.numpy().copy() for name, tensor in state.items()}
        return {
            "team": self._team.arrays(),
            "target": self._target.arrays(),
            "adam": moments,
            "steps": self._steps,
            "replay": self.replay.remembered(),
        }

    def recall(self, values: dict[str, Any]) -> None:
        """Go on from what ``remembered`` gave."""
        self._team.take(values["team"])
        self._target.take(values["target"])
        self._steps = values["steps"]
        self.replay.recall(values["replay"])
        moments = {
            int(at): {name: torch.from_numpy(array.copy()) for name, array in state.items()}
            for at, state in values["adam"].items()
        }
        whole = self._optimiser.state_dict()
        self._optimiser.load_state_dict({**whole, "state": moments})

    def _follow(self) -> None:
        settings = self._settings
        if settings.target == "periodic":
            if self._steps % settings.period == 0:
                self._target.load_state_dict(self._team.state_dict())
            return
        with torch.no_grad():
            pairs = zip(self._target.parameters(), self._team.parameters(), strict=True)
            for behind, ahead in pairs:
                behind.lerp_(ahead, settings.polyak)


def greedy(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """What each agent likes best (int64, n); who likes both alike goes on."""
    return (values[:, 1] >= values[:, 0]).astype(np.int64)


def _going_on(values: Tensor) -> Tensor:
    return (values[..., 1] >= values[..., 0]).long()


def _huber(found: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.smooth_l1_loss(found, wanted)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer drawn as torch draws its own, but from a generator."""
    layer = nn.Linear(inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
