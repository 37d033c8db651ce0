"""DepthFL's client half (Kim et al. 2023): E epochs on the exits that it holds, all at once."""

from __future__ import annotations

import math
from typing import cast

from flwr.app import ConfigRecord, Context

from clients import depth, updates, width
from clients.common import client_app
from clients.edge import OWN, Edge
from clients.fedavg import add_train
from clients.private import local_epochs
from clients.static_norm import add_statistics, narrower
from fedkit.models.exit_loss import for_exits, joint_loss, read_weights
from fedkit.models.exits import MultiExit
from fedkit.models.slicing import slicing_of


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A round's private training: every exit on the labels and on what the others say."""
    loss = joint_loss(
        read_weights(cast(str, config["exit-weights"])),
        distillation_weight(config),
        cast(float, config["temperature"]),
    )
    if edge.width is None:
        return local_epochs(edge, context, slot, config, loss=loss)
    slicing = slicing_of(f"exits:{edge.settings.model}", edge.data.shape, edge.outputs)
    return width.scaled_epochs(edge, context, slot, config, slicing, edge.width, loss)


def distillation_weight(config: ConfigRecord) -> float:
    """The weight of distillation in round t: d exp(-5 (1 - (t-1) / ramp)^2), and d after the ramp."""
    full, ramp = cast(float, config["distillation"]), cast(int, config["ramp-up"])
    passed = min((cast(int, config["server-round"]) - 1) / ramp, 1.0) if ramp else 1.0
    return full * math.exp(-5 * (1 - passed) ** 2)


def update(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """The E epochs on the own model, and what they tell."""
    loss = local_work(edge, context, OWN, config)
    told = {"train_loss": loss}
    if config["robust"]:
        # Each exit adds to the loss, and no client is to count less for the depth of its network.
        assert isinstance(edge.own, MultiExit)
        weights = for_exits(read_weights(cast(str, config["exit-weights"])), edge.own.depth)
        told |= updates.unexplained(edge, loss / (sum(weights) or 1.0))
    return told


app = client_app(local_work, updates.upload_bytes, fit=depth.fitted)
add_train(app, update)
add_statistics(app, narrower(lambda edge: f"exits:{edge.depth}:{edge.settings.model}"))
