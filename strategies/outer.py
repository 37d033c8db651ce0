"""Outer optimisers: the server's step from w towards the clients' mean w', as by gradient descent.

Server momentum (FedAvgM; Hsu, Qi & Brown 2019, arXiv 1909.06335): u <- beta u + (w - w'), w <- w - eta u.
SlowMo (Wang et al. 2020, arXiv 1910.00643): u <- beta u + (w - w') / gamma, w <- w - alpha gamma u, gamma
being the rate at which the clients trained in this round. The two differ where that rate changes.
With beta = 0 and eta = alpha = 1 either is plain averaging.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedkit.engine.events import Event
from fedkit.engine.strategy import FederatedStrategy
from fedkit.errors import UsageError
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.reduction import Arrays
from fedkit.models.schedules import batch_size, decay, warmed
from fedkit.settings import FederationSettings, setting


@dataclass(frozen=True)
class OuterHyperparameters:
    """What the server does with the clients' mean."""

    outer: str = setting(
        "none",
        "the server's step towards the clients' mean: none (takes the mean), momentum:BETA[,ETA] or "
        "slowmo:BETA[,ALPHA], as in momentum:0.9; ETA and ALPHA are 1 unless given",
        source="FedAvgM: beta 0.9; SlowMo: beta 0.4 to 0.8, alpha 1",
    )


@dataclass(frozen=True)
class Outer:
    """An outer optimiser.

    Attributes:
        beta: momentum, in [0, 1).
        rate: eta or alpha, above 0.
        slow: whether it is SlowMo, which measures the step in units of the clients' rate.
    """

    beta: float
    rate: float = 1.0
    slow: bool = False

    def step(
        self,
        before: Arrays,
        mean: Arrays,
        momentum: Mapping[str, NDArray[Any]],
        gamma: float,
        moved: Collection[str],
    ) -> tuple[Arrays, Arrays]:
        """The weights after the step, in the mean's dtypes, and the momentum (float64).

        Args:
            before: w.
            mean: w'.
            momentum: u; a tensor that it lacks begins at 0.
            gamma: the clients' rate.
            moved: names of the tensors that are stepped; the others are taken from the mean.
        """
        # At a rate of 0 nobody has moved.
        after, unit = dict(mean), gamma if self.slow and gamma else 1.0
        momenta: Arrays = {}
        for name in (name for name in mean if name in moved):
            old = before[name].astype(np.float64)
            u = (old - mean[name].astype(np.float64)) / unit
            if name in momentum:
                u = self.beta * momentum[name] + u
            momenta[name] = np.asarray(u)
            with np.errstate(over="ignore"):  # what becomes infinite is not taken: see outer_step
                after[name] = np.asarray(old - self.rate * unit * u).astype(mean[name].dtype)
        return after, momenta


def read_outer(spec: str) -> Outer | None:
    """The outer optimiser in ``momentum:0.9`` or ``slowmo:0.8,0.5``; None where it is plain averaging.

    Raises:
        UsageError: there is none such, or a number is out of range.
    """
    name, _, numbers = spec.partition(":")
    if spec == "none":
        return None
    try:
        beta, *rest = (float(number) for number in numbers.split(","))
        (rate,) = rest or (1.0,)
    except ValueError:
        beta = rate = math.nan
    if name not in ("momentum", "slowmo") or not (0 <= beta < 1 and 0 < rate < math.inf):
        raise UsageError(
            "outer must be none, momentum:BETA[,ETA] or slowmo:BETA[,ALPHA] with BETA from 0 to below 1 "
            f"and the other above 0, as in momentum:0.9, not {spec!r}."
        )
    # Said apart, so that nothing is rounded.
    return None if (beta, rate) == (0, 1) else Outer(beta, rate, name == "slowmo")


def outer_step(
    strategy: FederatedStrategy, server_round: int, before: ArrayRecord, mean: ArrayRecord
) -> ArrayRecord:
    """Where ``outer`` leads from w, given the clients' mean; w and u stay where that is not finite.

    Args:
        strategy: that has its hyper-parameters, and in its state ``momentum``, u.
        server_round: in which the clients trained.
        before: w.
        mean: w'.
    """
    outer = read_outer(strategy.hyper.outer)
    if outer is None:
        return mean
    gamma = clients_rate(strategy.hyper, strategy.facts.settings, server_round)
    old, new = as_arrays(before), as_arrays(mean)
    after, momentum = outer.step(old, new, strategy.state.momentum, gamma, strategy.parameters)
    wrong = [name for name, values in after.items() if not np.isfinite(values).all()]
    if wrong:
        text = f"outer={strategy.hyper.outer} leads too far ({wrong[0]} is not finite): the model stays"
        strategy.emit(Event("warning", server_round, "train", None, text))
        return before
    strategy.state.momentum = momentum
    return as_record(after)


def clients_rate(hyper: Any, settings: FederationSettings, server_round: int) -> float:
    """gamma, the learning rate of private training in a round, where it is the same for all clients."""
    at, patience = server_round - 1, hyper.schedule_patience
    fallen = decay(hyper.schedule, at, settings.rounds, hyper.schedule_factor, patience)
    rate: float = hyper.learning_rate * fallen * warmed(at, hyper.warmup)
    if hyper.scale_rate_to:
        size = batch_size(hyper.batch_schedule, hyper.batch_size, server_round)
        rate *= size / hyper.scale_rate_to
    return rate


def check_outer(hyper: Any) -> None:
    """Raise ``UsageError`` for an outer optimiser that there is not, or whose gamma is not known."""
    outer = read_outer(hyper.outer)
    if outer is None or not outer.slow:
        return
    if hyper.schedule == "plateau" or hyper.schedule_by == "step":
        raise UsageError(
            "SlowMo divides by the clients' learning rate, which the server does not know with "
            "schedule=plateau or schedule-by=step: take another schedule, or outer=momentum."
        )
