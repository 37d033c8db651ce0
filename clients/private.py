"""Training on a client's own data, as the strategies' clients do it each round."""

from __future__ import annotations

import math
import time
from itertools import islice
from typing import NamedTuple, cast

import torch
from flwr.app import ConfigRecord, Context
from torch import Tensor

from clients import memory, probing, schedule
from clients.common import keep
from clients.edge import Edge
from fedkit.models.losses import Loss, cross_entropy
from fedkit.models.schedules import batch_size
from fedkit.models.training import Pull, batches_of, endless, make_optimiser, take_steps


class Trained(NamedTuple):
    """What private training tells.

    Attributes:
        loss: the last epoch's mean loss; where steps were asked for, that of all.
        epochs: how many were done; the last part of steps counts as one.
    """

    loss: float
    epochs: int


def private_optimiser(
    edge: Edge, context: Context, slot: str, config: ConfigRecord, purpose: str
) -> torch.optim.Optimizer:
    """The optimiser that the hyper-parameters name, at the present learning rate.

    With ``keep-optimiser`` it goes on from where ``remember`` left it; ``purpose`` is ``private`` or
    ``digest``.
    """
    scale = rate_scale(config) if purpose == "private" else 1.0
    optimiser = make_optimiser(
        cast(str, config["optimiser"]),
        edge.models[slot],
        scale * schedule.rate(edge, context, slot, config),
        momentum=cast(float, config["momentum"]),
        decay=cast(float, config["weight-decay"]),
        trust=cast(float, config["trust-coefficient"]),
    )
    if config["keep-optimiser"]:
        memory.recall_optimiser(context, f"{slot}-{purpose}", optimiser)
    return optimiser


def remember(
    context: Context,
    slot: str,
    config: ConfigRecord,
    purpose: str,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Keep an optimiser's state for the next round, if it is to be kept."""
    if config["keep-optimiser"]:
        memory.keep_optimiser(context, f"{slot}-{purpose}", optimiser)


def private_batch(config: ConfigRecord) -> int:
    """The size of a private batch in this round."""
    first, round = cast(int, config["batch-size"]), cast(int, config["server-round"])
    return batch_size(cast(str, config["batch-schedule"]), first, round)


def rate_scale(config: ConfigRecord) -> float:
    """What private training multiplies the learning rate by: its batch size over the rate's own."""
    base = cast(int, config["scale-rate-to"])
    return private_batch(config) / base if base else 1.0


def time_budget(context: Context) -> float:
    """Seconds of this machine that a round's local training may take; infinity: as many as it takes.

    An emulated device has fewer of them.
    """
    node = context.node_config
    seconds = float(str(node.get("time-budget", 0))) or math.inf
    return seconds / float(str(node.get("slowdown", 1)))


def local_epochs(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    *,
    loss: Loss = cross_entropy,
    pull: Pull | None = None,
) -> float:
    """A round's ``local-steps`` or ``local-epochs`` on the private data; returns the mean loss.

    Tells the learning rate's schedule how it went. ``loss`` and ``pull`` are those of ``train_private``.
    """
    trained = train_locally(edge, context, slot, config, loss=loss, pull=pull)
    return trained.loss


def train_locally(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    *,
    loss: Loss = cross_entropy,
    pull: Pull | None = None,
    seconds: float = math.inf,
) -> Trained:
    """What ``local_epochs`` does, which may end early; tells how far it came."""
    trained = train_private(
        edge,
        context,
        slot,
        config,
        "local",
        cast(int, config["local-epochs"]),
        steps=cast(int, config["local-steps"]),
        loss=loss,
        pull=pull,
        seconds=seconds,
    )
    schedule.observe(edge, context, slot, config, trained.loss)
    keep(edge, context, slot)
    return trained


def with_revisit(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A whole round's private training: before the answer, and after the digest."""
    loss = local_epochs(edge, context, slot, config)
    revisit(edge, context, slot, config)
    return loss


def revisit(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> None:
    """``revisit-epochs`` on the private data, as FedMD has them after its digest."""
    epochs = cast(int, config["revisit-epochs"])
    if epochs:
        train_private(edge, context, slot, config, "revisit", epochs)
        keep(edge, context, slot)


def train_private(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    purpose: str,
    epochs: int,
    *,
    steps: int = 0,
    targets: tuple[Tensor, ...] | None = None,
    loss: Loss = cross_entropy,
    sums: dict[str, Tensor] | None = None,
    pull: Pull | None = None,
    seconds: float = math.inf,
) -> Trained:
    """Minimise a loss on the private data with the model in ``slot``; the optimiser is remembered.

    Args:
        edge, context, slot, config: whose model, in which round.
        purpose: names the random order, which is new in each round.
        epochs: passes over the data.
        steps: instead of them, if not 0; what is more than an epoch goes on in another order.
        targets: for ``loss``, n of each; None: the labels.
        loss: ``(logits, *targets) -> mean over a batch``.
        sums: tensors that ``loss`` adds to in place.
        pull: a proximal term beside the loss.
        seconds: as many whole epochs as are likely to be done by then, but at least one.

    The model itself is not kept.
    """
    model, data = edge.models[slot], edge.private.train
    targets = (data.labels,) if targets is None else targets
    size = private_batch(config)
    each = batches_of(len(data), size)
    total = steps if steps and each else each * epochs
    parts = math.ceil(total / each) if each else 0
    optimiser = private_optimiser(edge, context, slot, config, "private")
    order = edge.generator(purpose, cast(int, config["server-round"]))
    batches, clip = endless(len(data), size, order), cast(float, config["clip-norm"])
    lost, spent, ended = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def epoch(at: int) -> float:
        began, done = time.perf_counter(), at * each
        taking = min(each, total - done)
        stepping = schedule.within(
            edge, context, slot, config, optimiser, scale=rate_scale(config), done=done, total=total
        )
        some = islice(batches, taking)
        mean = take_steps(
            model, data, targets, loss, optimiser, some, clip=clip, schedule=stepping, pull=pull
        )
        schedule.count(context, slot, config, taking)
        lost.add_(mean * taking)
        ended.add_(1)
        spent.add_(time.perf_counter() - began)
        return mean

    mine = {"lost": lost, "spent": spent, "ended": ended}
    kept = "private" if config["keep-optimiser"] else ""
    place = probing.Place(slot, optimiser, order, kept, {**mine, **(sums or {})})
    last = probing.epochs(
        edge, context, place, parts, epoch, lambda at: float(spent) * (at + 1) / at <= seconds
    )
    remember(context, slot, config, "private", optimiser)
    return Trained(float(lost) / total if steps and total else last, int(ended))
