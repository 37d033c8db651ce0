"""Selectors beside each other in the same simulated federations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedkit.devices.settings import ObjectiveSettings, SimulationSettings
from fedkit.engine.roster import Member
from fedkit.engine.selection import Selector, View
from strategies.selectors.plain import BeforeTraining
from strategies.selectors.reward import Units, total
from strategies.selectors.samples import Samples
from strategies.selectors.simulator import Round, Simulation

# The accuracy that a run ends with is the mean of so many last rounds: a single one is noisy.
LAST_ROUNDS = 3


@dataclass(frozen=True)
class Result:
    """What one selector came to in one federation.

    Attributes:
        accuracy: of the global model on the test half, mean of the last three rounds, in [0, 1].
        seconds: total processing latency, on the virtual clock.
        bytes_up: all that came up.
        kept: clients whose work counted, a round.
        objective: w1 * accuracy - w2 * latency - w3 * bytes, in the objective's units.
        counts: clients whose work was to count, by round (the lost ones included).
    """

    accuracy: float
    seconds: float
    bytes_up: int
    kept: float
    objective: float
    counts: tuple[int, ...]


def simulate(
    selector: Selector,
    settings: SimulationSettings,
    samples: Samples,
    objective: ObjectiveSettings,
) -> Result:
    """One selector in one federation."""
    simulation = Simulation(settings, samples)
    return result_of(simulation.run(selector), Units(*simulation.full_round()), objective)


def result_of(rounds: Sequence[Round], units: Units, objective: ObjectiveSettings) -> Result:
    """What the rounds of a federation come to."""
    outcomes = [each.outcome for each in rounds]
    accuracy = float(np.mean([each.test_accuracy for each in rounds[-LAST_ROUNDS:]]))
    return Result(
        accuracy=accuracy,
        seconds=sum(outcome.seconds for outcome in outcomes),
        bytes_up=sum(outcome.bytes_up for outcome in outcomes),
        kept=float(np.mean([len(outcome.kept) for outcome in outcomes])),
        objective=total(accuracy, outcomes, units, objective),
        counts=tuple(len(outcome.kept) + len(outcome.lost) for outcome in outcomes),
    )


class AsMany(BeforeTraining):
    """Random dropping of as many as another run dropped: its number of clients in each round, drawn evenly.

    Nobody is probed, so those who are drawn do all their epochs at once.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def choose(self, view: View) -> Sequence[Member]:
        """So many of those who are there."""
        count = min(max(self._counts[view.round - 1], 1), len(view.members))
        drawn = view.generator.choice(len(view.members), size=count, replace=False)
        return [view.members[at] for at in sorted(drawn)]
