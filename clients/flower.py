"""The client half of Flower's own strategies: FedAvg's, with the proximal term of Flower's FedProx."""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context

from clients import updates
from clients.common import client_app
from clients.edge import OWN, Edge
from clients.fedavg import add_train
from clients.personal import fine_tuned
from clients.private import local_epochs
from clients.static_norm import add_statistics
from fedkit.models.training import Pull


def update(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """The E epochs, held by ``proximal-mu`` where the server says so."""
    pull = Pull.where(edge.own, cast(float, config.get("proximal-mu", 0.0)))
    return {"train_loss": local_epochs(edge, context, OWN, config, pull=pull)}


app = client_app(local_epochs, updates.upload_bytes, fine_tuned)
add_train(app, update)
add_statistics(app)
