"""Ditto's client half (Li et al. 2021, algorithm 1): return w trained; keep v trained near it."""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context, Message

from clients import shared, updates
from clients.common import client_app, keep
from clients.edge import OWN, edge_of
from clients.private import local_epochs
from clients.static_norm import add_statistics
from fedkit.knowledge.arrays import as_state_dict
from fedkit.models.training import Pull

# The global model's schedule and optimiser are its own, as FedAvg's would be.
GLOBAL = "global"

app = client_app(local_epochs, updates.upload_bytes, lambda edge, context, config, model: edge.own)
add_statistics(app)


@app.train()
def train(message: Message, context: Context) -> Message:
    """E epochs from w^t for the others; then E epochs on F_k(v) + lambda/2 ||v - w^t||^2 for oneself."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    came = message.content.array_records["arrays"]
    if GLOBAL not in edge.models:
        edge.remake(context, GLOBAL)
    model = edge.models[GLOBAL]
    shared.load(model, as_state_dict(came))
    if "reference" not in context.state:
        # v and the reference start where the client first met the federation.
        edge.own.load_state_dict(model.state_dict())
        keep(edge, context, OWN)
        edge.start_alone(context)
        context.state["reference"] = ConfigRecord({"since": config["server-round"]})
    near = Pull.where(model, cast(float, config["lam"]))
    with shared.training(model, config):
        told = {"train_loss": local_epochs(edge, context, GLOBAL, config)}
    returned = shared.back(model, came, config)
    told["personal_loss"] = local_epochs(edge, context, OWN, config, pull=near)
    return updates.answer(message, context, edge, model, returned, told)
