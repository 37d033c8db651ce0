"""Training FedMARL's agents on simulated federations, one after another, each with another seed.

If wanted, federations in which nobody trains come first (``cost_episodes``, ours): a round is as slow as
the slowest of those that go on, so one client's share in it is small, and a round's accuracy fluctuates
by more than it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedkit.devices.settings import ObjectiveSettings, SimulationSettings
from fedkit.seeds import derive, numpy_generator
from fedkit.settings import DataSettings, Value, as_config, build, refuse_unknown
from strategies.selectors.comparison import AsMany, Result, result_of, simulate
from strategies.selectors.fedmarl import FedMARL, Learning
from strategies.selectors.fedmarl_settings import FedMARLSettings
from strategies.selectors.policy import Policy, describe, load_policy, save_policy
from strategies.selectors.reward import Units
from strategies.selectors.samples import read_samples
from strategies.selectors.simulator import CostsOnly, Simulation, code_digest

# Federations that no policy is trained on, by which it is compared.
HELD_OUT = 5
# How far federations of training differ: costs of computing and of sending, as powers of ten.
COSTS = 0.5
UPLOADS = 0.5
Tell = Callable[[int, int, Result, float], None]


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        about: all that the policy's file says of itself.
        results: by selector, its result in each held-out federation.
    """

    about: Mapping[str, Any]
    results: Mapping[str, list[Result]]


class FedMARLTrainer:
    """fedmarl: agents that decide after a probing epoch who goes on."""

    @staticmethod
    def train(
        simulation: SimulationSettings,
        objective: ObjectiveSettings,
        options: Mapping[str, Value],
        episodes: int,
        sources: DataSettings,
        out: Path,
        tell: Tell,
    ) -> Trained:
        """Train a policy and save it.

        Args:
            simulation: the federations; costs of computing and sending vary around its.
            objective: what the team is paid for.
            options: hyper-parameters by outside name.
            episodes: how many federations, beside the cost episodes.
            sources: where this machine keeps data sets.
            out: the file.
            tell: called after each episode with how many are done, of how many, its result (accuracy 0 in
                a cost episode) and epsilon.

        Raises:
            UsageError: a setting that is none, or out of its range.
            FedkitError: the data set can't be read or the file not be written.
        """
        refuse_unknown(options, [FedMARLSettings])
        simulator = code_digest()
        samples = read_samples(simulation.dataset, sources)
        policy = Policy.untrained(build(FedMARLSettings, options), objective, simulation.seed)
        costs = policy.settings.cost_episodes
        cheap = replace(simulation, seed=derive(simulation.seed, "costs alone"))
        learning = Learning(policy, falling=(costs or episodes) * simulation.rounds // 2)
        for episode in range(costs + episodes):
            if episode == costs > 0:
                # Rounds without accuracy would tell that it is worth nothing.
                learning = Learning(policy, falling=episodes * simulation.rounds // 2)
            federation = (
                CostsOnly(varied(cheap, episode), samples, learning.compare)
                if episode < costs
                else Simulation(varied(simulation, episode - costs), samples, learning.compare)
            )
            learning.units = units = Units(*federation.full_round())
            rounds = federation.run(FedMARL(policy, learning))
            learning.end()
            result = result_of(rounds, units, objective)
            tell(episode + 1, costs + episodes, result, learning.epsilon)
        results = compare(policy, simulation, objective, sources)
        about = {
            "simulation": as_config(simulation),
            "episodes": episodes,
            "simulator": simulator,
            "results": {
                name: [asdict(result) for result in each] for name, each in results.items()
            },
        }
        finished = replace(policy, about=about)
        save_policy(out, finished)
        return Trained(describe(load_policy(out)), results)

    @staticmethod
    def describe(path: Path) -> dict[str, Any]:
        """What the policy in a file says of itself.

        Raises:
            FedkitError: it can't be read.
        """
        return describe(load_policy(path))


def varied(simulation: SimulationSettings, episode: int) -> SimulationSettings:
    """The federation of one episode: data, devices and networks of its own seed, and costs of its own."""
    generator = numpy_generator(simulation.seed, "episode's costs", round=episode)
    computing, sending = 10 ** generator.uniform(-COSTS, COSTS, 2)
    return replace(
        simulation,
        seed=derive(simulation.seed, "episode", round=episode),
        sample_ms=simulation.sample_ms * computing,
        upload_kb=simulation.upload_kb * sending,
        upload_spread=simulation.upload_spread + generator.uniform(0, UPLOADS),
    )


def compare(
    policy: Policy,
    simulation: SimulationSettings,
    objective: ObjectiveSettings,
    sources: DataSettings,
) -> dict[str, list[Result]]:
    """The policy beside everybody and beside random dropping of as many, on held-out seeds."""
    samples = read_samples(simulation.dataset, sources)
    untrained = Policy.untrained(policy.settings, objective, 0)
    results: dict[str, list[Result]] = {"everybody": [], "random": [], "fedmarl": []}
    for number in range(HELD_OUT):
        settings = replace(simulation, seed=derive(simulation.seed, "held out", round=number))
        ours = simulate(FedMARL(policy), settings, samples, objective)
        results["fedmarl"].append(ours)
        results["random"].append(simulate(AsMany(ours.counts), settings, samples, objective))
        # An untrained policy keeps everybody.
        results["everybody"].append(simulate(FedMARL(untrained), settings, samples, objective))
    return results
