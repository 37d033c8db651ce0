"""FedMD's client half (Li & Wang 2019, algorithm 1): communicate, digest, revisit.

Two Adam states live as long as the model, one for digest and one for revisit, the latter going on
from the initial training, as in the authors' code.
"""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor

from clients import memory, probing, public
from clients.common import client_app, keep, reply
from clients.density import resembling
from clients.edge import OWN, Edge, Work, edge_of
from clients.pretraining import add_init
from clients.schedule import observe, rate
from fedkit.models.losses import cross_entropy, towards
from fedkit.models.measure import measure
from fedkit.models.training import make_optimiser, train


def revisit(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    digested: dict[str, Tensor] | None = None,
) -> float:
    """Cross-entropy on the private data; a round's private training, of which a probe is the first epoch.

    ``digested``: what the digest before it told; after a probe it comes back from there.
    """
    optimiser = _optimiser(edge, context, slot, "revisit", config)
    order = edge.generator("revisit", cast(int, config["server-round"]))
    loss = probing.epochs(
        edge,
        context,
        probing.Place(slot, optimiser, order, "revisit", digested or {}),
        cast(int, config["revisit-epochs"]),
        lambda at: _epoch(edge, slot, config, "revisit", optimiser, order),
    )
    _keep_private(edge, context, slot, optimiser)
    observe(edge, context, slot, config, loss)
    return loss


def first_private_training(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """Transfer learning's second half: train privately, until validation accuracy no longer rises."""
    patience, val = cast(int, config["init-patience"]), edge.private.val
    # One Adam state for all private training: "revisit" goes on from here.
    optimiser = _optimiser(edge, context, OWN, "revisit", config)
    order = edge.generator("init", cast(int, config["server-round"]))
    best, waited, loss = -1.0, 0, 0.0
    for _ in range(cast(int, config["init-epochs"])):
        loss = _epoch(edge, OWN, config, "init", optimiser, order)
        if patience and len(val):
            accuracy, _ = measure(edge.own, val)
            best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
            if waited >= patience:
                break
    _keep_private(edge, context, OWN, optimiser)
    return {"init_loss": loss}


app = client_app(revisit)
add_init(app, first_private_training)


@app.query("logits")
def communicate(message: Message, context: Context) -> Message:
    """Class scores on the public subset of this round, in evaluation mode."""
    edge = edge_of(context)
    return reply(message, edge, {}, _answer(message, context, edge))


@app.train("digest")
def digest(message: Message, context: Context) -> Message:
    """Approach the consensus on the public subset, revisit the private data, answer the next subset."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    # The end of a probe begins after the digest, which was before the probed epoch.
    rest = edge.work is Work.REST
    told = dict.fromkeys(public.WATCHED, 0.0) if rest else _digest(message, context, edge)
    digested = {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}
    loss = revisit(edge, context, OWN, config, digested)
    metrics = {name: float(value) for name, value in digested.items()}
    metrics |= {"train_loss": loss, "revisit/accuracy_after": public.own_accuracy(edge)}
    ahead = "subset" in message.content.array_records
    return reply(message, edge, metrics, _answer(message, context, edge) if ahead else None)


def _digest(message: Message, context: Context, edge: Edge) -> dict[str, float]:
    config = message.content.config_records["config"]
    temperature, space = cast(float, config["temperature"]), cast(str, config["space"])
    loss = cast(str, config["digest-loss"])
    if loss == "auto":
        loss = "kl" if space == "prob" else "l1"
    optimiser = _optimiser(edge, context, OWN, "digest", config)
    told = public.digest(
        edge,
        public.targets(message, context, edge),
        towards(
            loss,
            space=space,
            temperature=temperature,
            scale=temperature**2 if loss == "kl" else 1.0,
        ),
        optimiser,
        epochs=cast(int, config["digest-epochs"]),
        batch_size=cast(int, config["digest-batch"]),
        generator=edge.generator("digest", cast(int, config["server-round"])),
    )
    memory.keep_optimiser(context, f"{OWN}-digest", optimiser)
    return told


def _answer(message: Message, context: Context, edge: Edge) -> public.Records:
    config = message.content.config_records["config"]
    valid = None
    if config["speak-about"] == "resembling":
        valid = resembling(
            edge, cast(float, config["kernel-width"]), cast(float, config["density-ratio"])
        )
    return public.answer(message, context, edge, valid)


def _optimiser(
    edge: Edge, context: Context, slot: str, purpose: str, config: ConfigRecord
) -> torch.optim.Optimizer:
    optimiser = make_optimiser("adam", edge.models[slot], rate(edge, context, slot, config))
    memory.recall_optimiser(context, f"{slot}-{purpose}", optimiser)
    return optimiser


def _epoch(
    edge: Edge,
    slot: str,
    config: ConfigRecord,
    purpose: str,
    optimiser: torch.optim.Optimizer,
    order: torch.Generator,
) -> float:
    data = edge.private.train
    return train(
        edge.models[slot],
        data,
        data.labels,
        cross_entropy,
        optimiser,
        epochs=1,
        batch_size=cast(int, config[f"{purpose}-batch"]),
        generator=order,
    )


def _keep_private(
    edge: Edge, context: Context, slot: str, optimiser: torch.optim.Optimizer
) -> None:
    memory.keep_optimiser(context, f"{slot}-revisit", optimiser)
    keep(edge, context, slot)
