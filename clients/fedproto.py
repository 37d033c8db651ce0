"""FedProto's client half (Tan et al. 2022): learn, near the global prototypes; tell one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import cast

import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.nn import functional

from clients.common import client_app, reply
from clients.edge import OWN, Edge, edge_of
from clients.fd import LabelMeans, learn, upload
from fedkit.errors import UsageError
from fedkit.knowledge import by_class
from fedkit.knowledge.by_class import ByClass
from fedkit.knowledge.consensus import Consensus
from fedkit.models.losses import Loss
from fedkit.models.measure import predict

app = client_app(learn, upload)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train near the global prototypes, then tell one's own and how many samples each is of."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    width, lam = cast(int, config["prototype-dim"]), cast(float, config["lam"])
    target = message.content.array_records.get("target")
    wanted = by_class.unpack_mean(target, edge.outputs, width)
    if lam and wanted.valid.any():
        with features(edge, width) as seen:
            loss = learn(edge, context, OWN, config, _near(edge, seen, wanted, lam))
    else:
        loss = learn(edge, context, OWN, config)
    told = by_class.pack(prototypes(edge, width))
    return reply(message, edge, {"train_loss": loss}, {"by-class": told})


@contextmanager
def features(edge: Edge, width: int) -> Iterator[list[Tensor]]:
    """The features (B x ``width``) of each batch that the own model reads, one after the other.

    They are what its last linear layer reads, flattened and averaged to ``width`` numbers.

    Raises:
        UsageError: the model has no linear layer.
    """
    layers = [module for module in edge.own.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UsageError(
            f"FedProto compares what a network's last linear layer reads, and the model "
            f"{edge.model_name} has no linear layer: choose another model for this client."
        )
    seen: list[Tensor] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].flatten(1)
        seen.append(flat @ pooling(flat.shape[1], width, flat.device))

    handle = layers[-1].register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@lru_cache
@torch.inference_mode(False)
def pooling(count: int, width: int, device: torch.device) -> Tensor:
    """Adaptive average pooling of ``count`` numbers to ``width``, as a matrix (float32).

    As a matrix, because the backward pass of torch's own is not repeatable on a GPU.
    """
    return functional.adaptive_avg_pool1d(torch.eye(count), width).to(device)


def prototypes(edge: Edge, width: int) -> ByClass:
    """The own model's mean features of each class of the private training data (paper, eq. 3)."""
    data, means = edge.private.train, LabelMeans(edge.outputs, width, edge.device)
    with features(edge, width) as seen:
        if len(data):
            predict(edge.own, data)
            means.add(torch.cat(seen), data.labels)
    return means.result()


def _near(edge: Edge, seen: list[Tensor], wanted: Consensus, lam: float) -> Loss:
    """lambda * the squared distance of the features just seen to the prototypes of their labels."""
    means = torch.from_numpy(wanted.targets).to(edge.device)
    valid = torch.from_numpy(wanted.valid).to(edge.device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        distance = (seen.pop() - means[labels]) * valid[labels][:, None]
        return lam * distance.square().mean()

    return loss
