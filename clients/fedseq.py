"""FedSeq's client half (Zaccone et al. 2022): FedAvg's training, and once a profile of one's classes."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from torch import Tensor

from clients import shared, updates
from clients.common import client_app, reply
from clients.edge import Edge, edge_of
from clients.fedavg import add_train
from clients.personal import fine_tuned, in_passing
from clients.private import local_epochs, train_private
from clients.static_norm import add_statistics
from fedkit.knowledge import subset
from fedkit.knowledge.arrays import as_state_dict
from fedkit.models.losses import soften
from fedkit.models.measure import predict

PROBED = "profile"

app = client_app(local_epochs, updates.upload_bytes, fine_tuned)
add_train(app)
add_statistics(app)


@app.train("profile")
def profile(message: Message, context: Context) -> Message:
    """Train a copy of the first model; tell what it then believes of the exemplars, class by class."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    came = as_state_dict(message.content.array_records["arrays"])
    edge.models[PROBED] = shared.completed(edge.own, came)
    epochs = cast(int, config["probe-epochs"])
    train_private(edge, context, PROBED, in_passing(config), "profile", epochs)
    exemplars = subset.read(message.content.array_records["subset"], len(edge.public))
    told = believed(edge, torch.from_numpy(exemplars)).cpu().numpy().astype(np.float32)
    del edge.models[PROBED]
    return reply(message, edge, {}, {"profile": ArrayRecord({"profile": Array(told)})})


def believed(edge: Edge, exemplars: Tensor) -> Tensor:
    """The profile (float64, C; sums to 1): how probable the model thinks each class on the exemplars.

    With labels (``public-labels``) the mean probability of the true class, over the exemplars of each;
    without them the mean probability over all.
    """
    samples = edge.public.take(exemplars)
    probabilities = soften(predict(edge.models[PROBED], samples), 1.0).double()
    if not edge.settings.public_labels:
        return probabilities.mean(dim=0)
    labels = samples.labels
    right = probabilities.gather(1, labels[:, None]).squeeze(1)
    counts = torch.bincount(labels, minlength=edge.outputs)
    sums = torch.zeros(edge.outputs, dtype=torch.float64, device=right.device)
    sums.index_add_(0, labels, right)
    means = sums / counts.clamp(min=1)
    return means / means.sum()
