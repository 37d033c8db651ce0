"""KT-pFL's client half (Zhang et al. 2021): train, tell one's soft predictions, learn from the mixture."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message

from clients import public
from clients.common import client_app, keep, reply
from clients.edge import OWN, Edge, edge_of
from clients.training import cross_entropy, kl_divergence, make_optimiser, train
from fedkit.models.measure import predict


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """The round's epochs of cross-entropy on the private data; the optimiser starts afresh."""
    model = edge.models[slot]
    data = edge.private.train
    loss = train(
        model,
        data,
        data.labels,
        cross_entropy,
        _optimiser(model, config),
        epochs=cast(int, config["round-epochs"]),
        batch_size=cast(int, config["batch-size"]),
        generator=edge.generator("local", cast(int, config["server-round"])),
    )
    keep(edge, context, slot)
    return loss


app = client_app(local_work)


@app.train("local")
def local(message: Message, context: Context) -> Message:
    """Train on the private data, then answer S_k = softmax(z / temperature) on the public subset."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    samples = public.asked(message, context, edge)
    loss = local_work(edge, context, OWN, config)
    scores = predict(edge.own, samples)
    soft = torch.softmax(scores / cast(float, config["temperature"]), dim=1)
    return reply(message, edge, {"train_loss": loss}, public.answer(context, edge, soft))


@app.train("distill")
def distill(message: Message, context: Context) -> Message:
    """Learn from the personal target T_k on the subset just answered."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    samples, target = public.targets(message, context, edge, "target")
    loss = train(
        edge.own,
        samples,
        target,
        kl_divergence(
            cast(float, config["temperature"]),
            reduction=cast(str, config["reduction"]),
            scale=cast(float, config["distill-weight"]),
        ),
        _optimiser(edge.own, config),
        epochs=cast(int, config["distill-epochs"]),
        batch_size=cast(int, config["distill-batch"]),
        generator=edge.generator("distill", cast(int, config["server-round"])),
    )
    keep(edge, context, OWN)
    return reply(message, edge, {"distill_loss": loss})


def _optimiser(model: torch.nn.Module, config: ConfigRecord) -> torch.optim.Optimizer:
    name, rate = cast(str, config["optimiser"]), cast(float, config["learning-rate"])
    return make_optimiser(name, model, rate)
