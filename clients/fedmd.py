"""FedMD's client half (Li & Wang 2019, algorithm 1): communicate, digest, revisit.

Two Adam states live as long as the model, one for digest and one for revisit, the latter going on
from the initial training, as in the authors' code.
"""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from torch import Tensor

from clients import memory, public
from clients.common import client_app, keep, reply
from clients.edge import OWN, Edge, edge_of
from clients.training import (
    Loss,
    absolute_error,
    cross_entropy,
    kl_divergence,
    make_optimiser,
    train,
)
from fedkit.models.measure import measure, predict


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """Revisit: cross-entropy on the private data."""
    return _on_private(
        edge,
        context,
        slot,
        config,
        epochs=cast(int, config["revisit-epochs"]),
        batch_size=cast(int, config["revisit-batch"]),
        purpose="revisit",
    )


app = client_app(local_work)


@app.train("init")
def init(message: Message, context: Context) -> Message:
    """Before the first round: train on the public set (if its labels are used), then privately."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    done = context.state.metric_records.get("init")
    if done is not None:
        # The reply was lost, not the training.
        return reply(message, edge, cast(dict[str, float], dict(done)))
    metrics: dict[str, float] = {}
    if edge.settings.public_labels:
        metrics["pretrain_loss"] = _pretrain(edge, config)
    metrics["init_loss"] = _on_private(
        edge,
        context,
        OWN,
        config,
        epochs=cast(int, config["init-epochs"]),
        batch_size=cast(int, config["init-batch"]),
        purpose="init",
        patience=cast(int, config["init-patience"]),
    )
    edge.start_alone(context)
    context.state["init"] = MetricRecord({**metrics})
    return reply(message, edge, metrics)


@app.query("logits")
def communicate(message: Message, context: Context) -> Message:
    """Class scores on the public subset of this round, in evaluation mode."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    scores = predict(edge.own, public.asked(message, context, edge))
    if config["space"] == "prob":
        scores = torch.softmax(scores / cast(float, config["temperature"]), dim=1)
    return reply(message, edge, {}, public.answer(context, edge, scores))


@app.train("digest")
def digest(message: Message, context: Context) -> Message:
    """Approach the consensus on the public subset, then revisit the private data."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    samples, consensus = public.targets(message, context, edge, "consensus")
    optimiser = _optimiser(edge, context, OWN, "digest", config)
    digest_loss = train(
        edge.own,
        samples,
        consensus,
        _digest_loss(config),
        optimiser,
        epochs=cast(int, config["digest-epochs"]),
        batch_size=cast(int, config["digest-batch"]),
        generator=edge.generator("digest", cast(int, config["server-round"])),
    )
    memory.keep_optimiser(context, f"{OWN}-digest", optimiser)
    revisit_loss = local_work(edge, context, OWN, config)
    return reply(message, edge, {"digest_loss": digest_loss, "train_loss": revisit_loss})


def _digest_loss(config: ConfigRecord) -> Loss:
    if config["space"] == "logit":
        return absolute_error
    temperature = cast(float, config["temperature"])
    return kl_divergence(temperature, reduction="batchmean", scale=temperature**2)


def _optimiser(
    edge: Edge, context: Context, slot: str, purpose: str, config: ConfigRecord
) -> torch.optim.Optimizer:
    optimiser = make_optimiser("adam", edge.models[slot], cast(float, config["learning-rate"]))
    memory.recall_optimiser(context, f"{slot}-{purpose}", optimiser)
    return optimiser


def _on_private(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    *,
    epochs: int,
    batch_size: int,
    purpose: str,
    patience: int = 0,
) -> float:
    # One Adam state for all private training: "revisit" goes on from "init".
    optimiser = _optimiser(edge, context, slot, "revisit", config)
    data = edge.private.train
    generator = edge.generator(purpose, cast(int, config["server-round"]))
    loss = _train_until(
        edge, edge.models[slot], data.labels, optimiser, generator, epochs, batch_size, patience
    )
    memory.keep_optimiser(context, f"{slot}-revisit", optimiser)
    keep(edge, context, slot)
    return loss


def _train_until(
    edge: Edge,
    model: torch.nn.Module,
    labels: Tensor,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    epochs: int,
    batch_size: int,
    patience: int,
) -> float:
    """Train; with validation data and a patience, stop when their accuracy no longer rises."""
    val, best, waited, loss = edge.private.val, -1.0, 0, 0.0
    stop_early = patience > 0 and len(val) > 0
    for _ in range(epochs):
        loss = train(
            model,
            edge.private.train,
            labels,
            cross_entropy,
            optimiser,
            epochs=1,
            batch_size=batch_size,
            generator=generator,
        )
        if stop_early:
            accuracy, _ = measure(model, val)
            best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
            if waited >= patience:
                break
    return loss


def _pretrain(edge: Edge, config: ConfigRecord) -> float:
    labels = edge.public.labels
    if edge.outputs > edge.data.classes:
        # The public set's classes are others than the private ones: they come after them.
        labels = labels + edge.data.classes
    optimiser = make_optimiser("adam", edge.own, cast(float, config["learning-rate"]))
    return train(
        edge.own,
        edge.public,
        labels,
        cross_entropy,
        optimiser,
        epochs=cast(int, config["pretrain-epochs"]),
        batch_size=cast(int, config["pretrain-batch"]),
        generator=edge.generator("pretrain", 0),
    )
