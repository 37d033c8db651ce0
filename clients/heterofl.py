"""HeteroFL's client half (Diao, Ding & Tarokh 2021): train the narrow network that came, and return it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from flwr.app import ConfigRecord, Context
from torch import Tensor

from clients import updates, width
from clients.common import client_app
from clients.edge import OWN, Edge
from clients.fedavg import add_train
from clients.static_norm import add_statistics, narrower
from fedkit.knowledge.held import pack_classes
from fedkit.models.levels import read_levels
from fedkit.models.losses import cross_entropy, masked_cross_entropy
from fedkit.models.narrow import at_width, width_of
from fedkit.models.slicing import slicing_of


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A round's private training at the width of the network in ``slot``, relative to the widest."""
    widest, part = read_levels(cast(str, config["levels"]))[0], edge.architecture(slot)
    share = (1.0 if part == edge.settings.model else width_of(part)) / widest
    loss = cross_entropy
    if config["masked"]:
        held = torch.zeros(edge.outputs, dtype=torch.bool, device=edge.device)
        held[_classes(edge)] = True
        loss = masked_cross_entropy(held)
    slicing = slicing_of(edge.settings.model, edge.data.shape, edge.outputs)
    divisor = share if config["scaler"] else 1.0
    return width.scaled_epochs(edge, context, slot, config, slicing, divisor, loss)


def update(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """The E epochs on the part of theta that came, and what they tell."""
    loss = local_work(edge, context, OWN, config)
    if config["buffers"] == "local" and config["assignment"] == "dynamic":
        # It may be long until this width comes again.
        edge.keep_statistics(context, OWN)
    return {"train_loss": loss}


def _at_its_width(edge: Edge, context: Context, config: ConfigRecord) -> None:
    edge.hold(context, OWN, at_width(edge.settings.model, cast(float, config["width"])))


def _held(edge: Edge, config: ConfigRecord) -> Mapping[str, ConfigRecord]:
    """Which classes are held, where the server wants to know."""
    if not config["masked"]:
        return {}
    classes = pack_classes(_classes(edge).cpu().numpy(), edge.outputs)
    return {"held": ConfigRecord({"classes": classes})}


app = client_app(local_work, updates.upload_bytes, fit=width.fitted)
add_train(app, update, prepare=_at_its_width, beside=_held)
add_statistics(app, narrower(lambda edge: edge.settings.model))


def _classes(edge: Edge) -> Tensor:
    """The classes (int64, in order) of this client's training data."""
    held: Tensor = edge.private.train.labels.unique()  # type: ignore[no-untyped-call]
    return held
