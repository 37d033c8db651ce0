"""The public subset of a round, as a client meets it: asked for answers on it, then given targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor

from clients.edge import Edge
from fedkit.data.samples import Samples
from fedkit.knowledge import codecs, rows, subset
from fedkit.knowledge.rows import Mask
from fedkit.models.losses import Loss, soften
from fedkit.models.measure import measure, predict
from fedkit.models.training import train

# What ``watched`` tells.
WATCHED = (
    "digest/accuracy_before",
    "digest/accuracy_after",
    "digest/loss_before",
    "digest/loss",
)
Records: TypeAlias = dict[str, ArrayRecord | ConfigRecord]


def answer(message: Message, context: Context, edge: Edge, valid: Mask | None = None) -> Records:
    """What the own model says on the subset in an instruction, as records of a reply.

    The subset is kept for the targets that follow. Raw class scores (``space=logit``) or
    softmax(z / temperature) (``prob``), in evaluation mode, in the codec that the server names.

    Args:
        message: an instruction with ``subset`` and ``config``.
        context: where the subset is kept.
        edge: who answers.
        valid: rows of the public set (bool, M0) that this client wants to speak about.

    Raises:
        ValueError: the subset is no list of indices into the public set.
    """
    config = message.content.config_records["config"]
    record = message.content.array_records["subset"]
    indices = subset.read(record, len(edge.public))
    context.state["subset"] = record
    scores = predict(edge.own, edge.public.take(torch.from_numpy(indices)))
    edge.answered = subset.digest(indices), scores
    if config["space"] == "prob":
        scores = soften(scores, cast(float, config["temperature"]))
    told = scores.cpu().numpy()
    records: Records = {"answer": ConfigRecord({"subset-digest": subset.digest(indices)})}
    mine = np.ones(len(indices), dtype=np.bool_) if valid is None else valid[indices]
    if not mine.any():
        return {"answer": ConfigRecord({"subset-digest": subset.digest(indices), "silent": True})}
    if not mine.all():
        records["rows"], told = rows.record(mine), told[mine]
    records["logits"] = codecs.pack(cast(str, config["codec"]), told)
    return records


def targets(message: Message, context: Context, edge: Edge) -> tuple[Samples, Tensor, Tensor]:
    """The samples that were answered and have targets, the targets (float32), and what was answered.

    The last are the own model's raw class scores on these samples, before it learns from them.

    Raises:
        ValueError: the targets belong to another subset, or are no finite numbers of its size.
    """
    config = message.content.config_records["config"]
    indices = subset.read(context.state.array_records["subset"], len(edge.public))
    if subset.digest(indices) != cast(str, config["subset-digest"]):
        raise ValueError("the targets belong to another public subset than the one answered")
    valid = rows.read(message.content.array_records.get("rows"), len(indices))
    record = message.content.array_records["target"]
    wanted = codecs.unpack(
        cast(str, config["codec"]),
        record,
        int(valid.sum()),
        edge.outputs,
        space=cast(str, config["space"]),
    )
    samples = edge.public.take(torch.from_numpy(indices[valid]))
    digest, scores = edge.answered
    if digest == subset.digest(indices):
        mine = scores[torch.from_numpy(valid).to(scores.device)]
    else:  # another process answered, before a restart
        mine = predict(edge.own, samples)
    return samples, torch.from_numpy(wanted).to(edge.device), mine


def digest(
    edge: Edge,
    learn_from: tuple[Samples, Tensor, Tensor],
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Train the own model towards targets; tells accuracy on own data and loss, before and after."""
    samples, wanted, answered = learn_from
    return watched(
        edge,
        float(loss(answered, wanted)),
        lambda: train(
            edge.own,
            samples,
            wanted,
            loss,
            optimiser,
            epochs=epochs,
            batch_size=batch_size,
            generator=generator,
        ),
    )


def watched(edge: Edge, loss_before: float, learn: Callable[[], float]) -> dict[str, float]:
    """Let the own model learn, and tell accuracy on own data and loss, before and after.

    Accuracy is on the client's validation data, else on its own test data; it steers nothing.
    """
    before = own_accuracy(edge)
    loss = learn()
    return dict(zip(WATCHED, (before, own_accuracy(edge), loss_before, loss), strict=True))


def own_accuracy(edge: Edge) -> float:
    """Accuracy of the own model on the client's validation data, else on its own test data."""
    accuracy, _ = measure(
        edge.own, edge.private.val if len(edge.private.val) else edge.private.test
    )
    return accuracy
