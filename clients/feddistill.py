"""FedDistill's client half (Jiang, Shan & Zhang 2020): a personal teacher, and what it gives to others."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor, nn

from clients import public, shared, updates
from clients.common import client_app, global_model
from clients.digesting import add_local, digested
from clients.edge import OWN, Edge, edge_of
from clients.private import (
    local_epochs,
    private_batch,
    private_optimiser,
    train_private,
    with_revisit,
)
from clients.schedule import observe
from clients.static_norm import add_statistics
from fedkit.knowledge.arrays import as_state_dict
from fedkit.models.losses import Loss, cross_entropy, kl_divergence, soften
from fedkit.models.measure import predict
from fedkit.models.training import endless, one_epoch
from fedkit.seeds import derive

# The copy's schedule and optimiser are its own, as FedAvg's would be.
COPY = "copy"


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """What a client without the others does: the personal network's own epochs."""
    if config["exchange"] == "logits":
        return with_revisit(edge, context, slot, config)
    return _teach_teacher(edge, context, slot, config)


app = client_app(local_work, partial(updates.upload_bytes, slot=COPY), slot=COPY)
add_local(app)


@app.train("digest")
def digest(message: Message, context: Context) -> Message:
    """(1 - lambda) CE on the private data + lambda tau^2 KL(Q || own) on the subset just answered."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    samples, wanted, answered = public.targets(message, context, edge)
    divergence, share = _divergence(config), cast(float, config["distill-weight"])
    private, model, round = edge.private.train, edge.own, cast(int, config["server-round"])
    optimiser = private_optimiser(edge, context, OWN, config, "digest")
    theirs = edge.generator("digest", round)
    mine = endless(len(private), private_batch(config), edge.generator("digest/private", round))

    def learn() -> float:
        model.train()
        mean, labelled = 0.0, torch.zeros((), device=edge.device)
        for _ in range(cast(int, config["digest-epochs"])):
            total = torch.zeros((), device=edge.device)
            for at in one_epoch(len(samples), cast(int, config["digest-batch"]), theirs):
                at = at.to(edge.device)
                optimiser.zero_grad(set_to_none=True)
                if len(private):
                    own = next(mine).to(edge.device)
                    labelled = cross_entropy(model(private.inputs(own)), private.labels[own])
                distilled = divergence(model(samples.inputs(at)), wanted[at])
                loss = (1 - share) * labelled + share * distilled
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += distilled.detach() * len(at)
            mean = float(total) / max(len(samples), 1)
        return mean

    told = public.watched(edge, float(divergence(answered, wanted)), learn)
    return digested(message, context, edge, optimiser, told)


@app.train()
def train_copy(message: Message, context: Context) -> Message:
    """Teach the personal teacher; let the copy of the global model learn from it and from labels."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    # A stream of its own: the copy then trains as FedAvg's would, whatever the teacher draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(edge.settings.seed, "teacher", edge.client))
        if "teacher" not in context.state:
            _first_lesson(edge, context, config)
        _teach_teacher(edge, context, OWN, config)
    came = message.content.array_records["arrays"]
    edge.hold(context, COPY, edge.settings.model)
    copy, weights = edge.models[COPY], as_state_dict(came)
    shared.load(copy, weights)
    share, data = cast(float, config["distill-weight"]), edge.private.train
    targets: tuple[Tensor, ...] = (data.labels,)
    loss: Loss = cross_entropy
    if share and len(data):
        # Once a round: the teacher does not change while the copy learns.
        teacher = soften(predict(edge.own, data), cast(float, config["temperature"]))
        targets, loss = (data.labels, teacher), _guided(config, share)
    with shared.training(copy, config):
        mean = train_private(
            edge,
            context,
            COPY,
            config,
            "local",
            cast(int, config["local-epochs"]),
            steps=cast(int, config["local-steps"]),
            targets=targets,
            loss=loss,
        ).loss
    observe(edge, context, COPY, config, mean)
    if shared.staying(copy, weights):
        edge.keep_statistics(context, COPY)
    arrays = shared.back(copy, came, config)
    return updates.answer(message, context, edge, copy, arrays, {"train_loss": mean})


def _copies(edge: Edge, message: Message) -> Iterable[tuple[str, nn.Module]]:
    yield (
        edge.settings.model,
        global_model(edge, message.content.array_records["arrays"], edge.settings.model),
    )


add_statistics(app, _copies)


def _first_lesson(edge: Edge, context: Context, config: ConfigRecord) -> None:
    first = ConfigRecord({**config, "teacher-epochs": config["teacher-first"], "server-round": 0})
    # A schedule counts rounds, and this comes before them.
    first["schedule"], first["schedule-by"], first["warmup"] = "constant", "round", 0
    _teach_teacher(edge, context, OWN, first)
    edge.start_alone(context)
    context.state["teacher"] = ConfigRecord({"since": config["server-round"]})


def _teach_teacher(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    epochs = ConfigRecord({**config, "local-epochs": config["teacher-epochs"], "local-steps": 0})
    return local_epochs(edge, context, slot, epochs)


def _guided(config: ConfigRecord, share: float) -> Loss:
    divergence = _divergence(config)

    def loss(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        return (1 - share) * cross_entropy(logits, labels) + share * divergence(logits, teacher)

    return loss


def _divergence(config: ConfigRecord) -> Loss:
    tau = cast(float, config["temperature"])
    return kl_divergence(tau, reduction="batchmean", scale=tau**2)
