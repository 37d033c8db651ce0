"""Training on a client's own data, as the strategies' clients do it each round."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ConfigRecord, Context

from clients import memory, probing
from clients.common import keep
from clients.edge import Edge
from clients.schedule import observe, rate
from fedkit.models.losses import cross_entropy
from fedkit.models.training import make_optimiser, train


def private_optimiser(
    edge: Edge, context: Context, slot: str, config: ConfigRecord, purpose: str
) -> torch.optim.Optimizer:
    """The optimiser that the hyper-parameters name, at this round's learning rate.

    With ``keep-optimiser`` it goes on from where ``remember`` left it; ``purpose`` is ``private`` or
    ``digest``.
    """
    optimiser = make_optimiser(
        cast(str, config["optimiser"]),
        edge.models[slot],
        rate(edge, context, slot, config),
        cast(float, config["momentum"]),
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


def local_epochs(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A round's ``local-epochs`` on the private data; tells the learning rate's schedule how it went."""
    loss = private_epochs(edge, context, slot, config, "local", cast(int, config["local-epochs"]))
    observe(edge, context, slot, config, loss)
    return loss


def with_revisit(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A whole round's private training: before the answer, and after the digest."""
    loss = local_epochs(edge, context, slot, config)
    revisit(edge, context, slot, config)
    return loss


def revisit(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> None:
    """``revisit-epochs`` on the private data, as FedMD has them after its digest."""
    epochs = cast(int, config["revisit-epochs"])
    if epochs:
        private_epochs(edge, context, slot, config, "revisit", epochs)


def private_epochs(
    edge: Edge, context: Context, slot: str, config: ConfigRecord, purpose: str, epochs: int
) -> float:
    """Cross-entropy on the private data with the model in ``slot``.

    The model is kept afterwards; ``purpose`` names the random order. Returns the last epoch's mean loss.
    """
    data, optimiser = edge.private.train, private_optimiser(edge, context, slot, config, "private")
    order = edge.generator(purpose, cast(int, config["server-round"]))

    def epoch(at: int) -> float:
        return train(
            edge.models[slot],
            data,
            data.labels,
            cross_entropy,
            optimiser,
            epochs=1,
            batch_size=cast(int, config["batch-size"]),
            generator=order,
        )

    kept = "private" if config["keep-optimiser"] else ""
    place = probing.Place(slot, optimiser, order, kept)
    loss = probing.epochs(edge, context, place, epochs, epoch)
    remember(context, slot, config, "private", optimiser)
    keep(edge, context, slot)
    return loss
