"""FedMD's client half (Li & Wang 2019, algorithm 1): communicate, digest, revisit.

Two Adam states live as long as the model, one for digest and one for private training, which in a
revisit goes on from the initial one, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor

from clients import memory, public
from clients.common import client_app, keep, reply
from clients.density import resembling
from clients.edge import OWN, Edge, Work, edge_of
from clients.pretraining import add_init
from clients.private import train_private
from clients.schedule import observe, rate
from fedkit.models.losses import cross_entropy, towards
from fedkit.models.measure import measure
from fedkit.models.training import make_optimiser, train

# What the hyper-parameters of others say of their optimiser.
ADAM: Mapping[str, bool | float | str] = {
    "optimiser": "adam",
    "momentum": 0.0,
    "weight-decay": 0.0,
    "trust-coefficient": 0.0,
    "clip-norm": 0.0,
    "keep-optimiser": True,
}


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
    private = ConfigRecord({**config, **ADAM, "batch-size": config["revisit-batch"]})
    epochs, steps = cast(int, config["revisit-epochs"]), cast(int, config["local-steps"])
    loss = train_private(
        edge, context, slot, private, "revisit", epochs, steps=steps, sums=digested
    ).loss
    observe(edge, context, slot, config, loss)
    keep(edge, context, slot)
    return loss


def first_private_training(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """Transfer learning's second half: train privately, until validation accuracy no longer rises."""
    optimiser = _optimiser(edge, context, "private", config)
    data, val, patience = edge.private.train, edge.private.val, cast(int, config["init-patience"])
    order = edge.generator("init", cast(int, config["server-round"]))
    best, waited, loss = -1.0, 0, 0.0
    for _ in range(cast(int, config["init-epochs"])):
        loss = train(
            edge.own,
            data,
            data.labels,
            cross_entropy,
            optimiser,
            epochs=1,
            batch_size=cast(int, config["init-batch"]),
            generator=order,
        )
        if patience and len(val):
            accuracy, _ = measure(edge.own, val)
            best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
            if waited >= patience:
                break
    memory.keep_optimiser(context, f"{OWN}-private", optimiser)
    keep(edge, context, OWN)
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
    optimiser = _optimiser(edge, context, "digest", config)
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
    edge: Edge, context: Context, purpose: str, config: ConfigRecord
) -> torch.optim.Optimizer:
    optimiser = make_optimiser("adam", edge.own, rate(edge, context, OWN, config))
    memory.recall_optimiser(context, f"{OWN}-{purpose}", optimiser)
    return optimiser
