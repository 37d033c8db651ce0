"""FedProx's client half (Li et al. 2020, algorithm 2): minimise F_k(w) + mu/2 ||w - w^t||^2, inexactly."""

from __future__ import annotations

import math
from typing import cast

from flwr.app import ConfigRecord, Context

from clients import updates
from clients.common import client_app
from clients.edge import OWN, Edge
from clients.fedavg import add_train
from clients.personal import fine_tuned
from clients.private import local_epochs, time_budget, train_locally
from clients.static_norm import add_statistics
from fedkit.models.measure import measure
from fedkit.models.training import Pull


def update(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """As many of the E epochs as the server grants, or this device has the time for; held by mu."""
    told: dict[str, float] = {}
    if config["adaptive-mu"] and len(edge.private.train):
        told["loss_before"] = measure(edge.own, edge.private.train)[1]
    pull = Pull.where(edge.own, cast(float, config["mu"]))
    seconds = time_budget(context) if config["work"] == "budget" else math.inf
    trained = train_locally(edge, context, OWN, config, pull=pull, seconds=seconds)
    told["train_loss"] = trained.loss
    if config["work"] != "full":
        told["local_epochs"] = trained.epochs
    return told


app = client_app(local_epochs, updates.upload_bytes, fine_tuned)
add_train(app, update)
add_statistics(app)
