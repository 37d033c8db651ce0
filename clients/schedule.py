"""The learning rate of a client's model: its own schedule, by round or by step, kept with the model."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ConfigRecord, Context, MetricRecord
from torch.optim.lr_scheduler import LambdaLR

from clients.edge import Edge
from fedkit.models.measure import measure
from fedkit.models.schedules import decay, warmed


def rate(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    *,
    ahead: int = 0,
    share: float = 0.0,
) -> float:
    """The learning rate of the model in ``slot``, as its schedule has it now.

    Args:
        edge, context, slot, config: whose, in which round.
        ahead: steps from now; they count with ``schedule-by=step``.
        share: of this round's private training, what is done by then: cosine's end is the run's, which
            counts rounds, so this is how it moves on within one.
    """
    done = max(cast(int, config["server-round"]) - 1, 0)
    by_step = config["schedule-by"] == "step"
    at: float = _steps(context, slot) + ahead if by_step else done
    warm = warmed(at, cast(int, config["warmup"]))
    if config["schedule"] == "cosine" and by_step:
        at = done + share
    end = edge.settings.rounds if config["schedule"] == "cosine" else 0
    factor, patience = (
        cast(float, config["schedule-factor"]),
        cast(int, config["schedule-patience"]),
    )
    fallen = decay(cast(str, config["schedule"]), at, end, factor, patience)
    return _plateau(context, slot, config) * fallen * warm


def within(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    optimiser: torch.optim.Optimizer,
    *,
    scale: float,
    done: int,
    total: int,
) -> LambdaLR | None:
    """What steps the rate of private training, with ``schedule-by=step``.

    Args:
        edge, context, slot, config: as for ``rate``.
        optimiser: whose rate it is.
        scale: what the schedule's rate is multiplied by.
        done, total: steps of this training, so far and in all.
    """
    if config["schedule-by"] != "step":
        return None
    for group in optimiser.param_groups:
        group["initial_lr"] = scale

    def current(ahead: int) -> float:
        share = min((done + ahead) / total, 1.0)
        return rate(edge, context, slot, config, ahead=ahead, share=share)

    # Steps are counted once they are taken: what is ahead is counted from the same place throughout.
    return LambdaLR(optimiser, current)


def count(context: Context, slot: str, config: ConfigRecord, steps: int) -> None:
    """Note that the model in ``slot`` has taken steps, where its schedule wants to know."""
    if config["schedule-by"] == "step":
        context.state[f"{slot}-steps"] = MetricRecord({"steps": _steps(context, slot) + steps})


def observe(
    edge: Edge, context: Context, slot: str, config: ConfigRecord, train_loss: float
) -> None:
    """Tell the schedule how a round of local training went.

    ``plateau`` follows the validation loss where the client has validation data, else the training
    loss: after more than ``schedule-patience`` rounds without a better one the rate is multiplied by
    ``schedule-factor`` (torch's ``ReduceLROnPlateau``).
    """
    if config["schedule"] != "plateau":
        return
    progress = train_loss
    if len(edge.private.val):
        _, progress = measure(edge.models[slot], edge.private.val)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=_plateau(context, slot, config))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser,
        factor=cast(float, config["schedule-factor"]),
        patience=cast(int, config["schedule-patience"]),
    )
    kept = context.state.metric_records.get(f"{slot}-schedule")
    if kept is not None:
        plateau.best, plateau.num_bad_epochs = cast(float, kept["best"]), cast(int, kept["waited"])
    plateau.step(progress)
    context.state[f"{slot}-schedule"] = MetricRecord(
        {
            "rate": float(optimiser.param_groups[0]["lr"]),
            "best": float(plateau.best),
            "waited": int(plateau.num_bad_epochs),
        }
    )


def _plateau(context: Context, slot: str, config: ConfigRecord) -> float:
    """The base rate, or what a plateau has left of it."""
    kept = context.state.metric_records.get(f"{slot}-schedule")
    if config["schedule"] != "plateau" or kept is None:
        return cast(float, config["learning-rate"])
    return cast(float, kept["rate"])


def _steps(context: Context, slot: str) -> int:
    kept = context.state.metric_records.get(f"{slot}-steps")
    return 0 if kept is None else cast(int, kept["steps"])
