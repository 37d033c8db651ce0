"""What a team of agents is paid for: accuracy, latency and bytes of a round (algorithms.md 8).

Latency and bytes are counted in rounds of everybody (``Units``), so that the weights mean the same for
any network and any device; this scale is ours, and the weights' defaults are not verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedkit.devices.settings import ObjectiveSettings
from fedkit.engine.selection import Outcome


@dataclass(frozen=True)
class Units:
    """What a round costs in which nobody is dropped.

    Attributes:
        seconds: its processing latency, above 0.
        size: bytes that come up, above 0.
    """

    seconds: float
    size: float


def utility(percent: float) -> float:
    """U(x) = 10 - 20 / (1 + e^{0.35 x}) = 10 tanh(0.175 x), x the accuracy in percent.

    As in the FedLPS authors' code, with the sign that rewards accuracy: another public code has
    e^{0.35 (1 - x)}, which falls. U rises from 0 to 9.99 at 40 % and says next to nothing above; in units
    of [0, 1] it would be nearly flat.
    """
    return 10 * math.tanh(0.175 * percent)


def worth(accuracy: float, objective: ObjectiveSettings) -> float:
    """What an accuracy in [0, 1] is worth: its percentage points, or U of them."""
    percent = 100 * accuracy
    return percent if objective.utility == "points" else utility(percent)


def team_reward(
    outcome: Outcome, before: float, units: Units, objective: ObjectiveSettings
) -> float:
    """r_t = w1 (U(Acc_t) - U(Acc_{t-1})) - w2 H_t - w3 B_t.

    Args:
        outcome: the round's; its accuracy is a number.
        before: accuracy after the round before, in [0, 1].
        units: what latency and bytes are counted in.
        objective: w1, w2, w3 and which utility.
    """
    gain = worth(outcome.accuracy, objective) - worth(before, objective)
    cost = objective.w2 * outcome.seconds / units.seconds
    return objective.w1 * gain - cost - objective.w3 * outcome.bytes_up / units.size


def gained(outcome: Outcome, everybody: Outcome, objective: ObjectiveSettings) -> float:
    """w1 (U(Acc) - U(Acc of all)): what a round's accuracy is worth beside that of the same round in which
    everybody goes on (ours); 0 where everybody does.

    Both begin with the same network and orders of data, so most of the noise, which they share, is gone.
    """
    return objective.w1 * (
        worth(outcome.accuracy, objective) - worth(everybody.accuracy, objective)
    )


def saved(
    outcome: Outcome, everybody: Outcome, units: Units, objective: ObjectiveSettings
) -> float:
    """- w2 (H - H of all) - w3 (B - B of all): what a round saves beside the same round with everybody."""
    seconds = (outcome.seconds - everybody.seconds) / units.seconds
    sizes = (outcome.bytes_up - everybody.bytes_up) / units.size
    return -objective.w2 * seconds - objective.w3 * sizes


def total(
    accuracy: float, outcomes: Sequence[Outcome], units: Units, objective: ObjectiveSettings
) -> float:
    """w1 U(Acc_T) - w2 sum H_t - w3 sum B_t: what all rewards of a run are, but for where it began."""
    seconds = sum(outcome.seconds for outcome in outcomes) / units.seconds
    sizes = sum(outcome.bytes_up for outcome in outcomes) / units.size
    return objective.w1 * worth(accuracy, objective) - objective.w2 * seconds - objective.w3 * sizes
