"""FD's client half (Jeong et al. 2018): learn from labels and the others' mean answers, note one's own."""

from __future__ import annotations

import math
from itertools import islice
from typing import cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor
from torch.nn import functional

from clients import probing
from clients.common import client_app, keep, reply
from clients.edge import OWN, Edge, edge_of
from clients.private import private_optimiser, remember
from clients.schedule import observe
from fedkit.knowledge import by_class
from fedkit.knowledge.by_class import ByClass
from fedkit.knowledge.consensus import Consensus
from fedkit.models.losses import Loss, cross_entropy, soften
from fedkit.models.training import batches_of, endless, take_steps


def learn(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    also: Loss | None = None,
    sums: dict[str, Tensor] | None = None,
) -> float:
    """A round of cross-entropy, plus ``also``, on the model in ``slot``; the model is kept.

    Args:
        edge, context, slot, config: as for ``client_app``'s local work; ``local-steps`` steps if the
            configuration has them, else ``local-epochs``.
        also: ``(logits, labels) -> scalar``, called at every step.
        sums: tensors that ``also`` adds to in place.

    Returns:
        The mean cross-entropy over the round, without ``also``: a term that begins in a later round
        must not look to the learning rate's schedule like a loss that got worse.
    """
    model, data = edge.models[slot], edge.private.train
    labelled = torch.zeros((), device=edge.device)
    seen = torch.zeros((), dtype=torch.int64)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(logits, labels)
        labelled.add_(value.detach(), alpha=len(labels))
        seen.add_(len(labels))
        return value if also is None else value + also(logits, labels)

    size, steps = cast(int, config["batch-size"]), cast(int, config.get("local-steps", 0))
    order = edge.generator("local", cast(int, config["server-round"]))
    each = batches_of(len(data), size)
    total = steps if steps and each else each * cast(int, config["local-epochs"])
    optimiser = private_optimiser(edge, context, slot, config, "private")
    batches = endless(len(data), size, order)

    def epoch(at: int) -> float:
        part = islice(batches, min(each, total - at * each))
        return take_steps(model, data, data.labels, loss, optimiser, part)

    sums = {"labelled": labelled, "seen": seen, **(sums or {})}
    kept = "private" if config["keep-optimiser"] else ""
    place = probing.Place(slot, optimiser, order, kept, sums)
    probing.epochs(edge, context, place, math.ceil(total / max(each, 1)), epoch)
    mean = float(labelled) / max(int(seen), 1)
    remember(context, slot, config, "private", optimiser)
    observe(edge, context, slot, config, mean)
    keep(edge, context, slot)
    return mean


class LabelMeans:
    """Means of rows by label, summed where the rows are."""

    def __init__(self, classes: int, width: int, device: torch.device) -> None:
        # In double precision: a GPU adds in any order, which the cast to float32 then hides.
        precise = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros((classes, width), dtype=precise, device=device)
        self._counts = torch.zeros(classes, dtype=torch.int32, device=device)

    @property
    def sums(self) -> dict[str, Tensor]:
        """What it adds to, in place."""
        return {"sums": self._sums, "counts": self._counts}

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Take in B rows (B x D) and their labels (int64, B)."""
        self._sums.index_add_(0, labels, rows.to(self._sums.dtype))
        self._counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int32))

    def result(self) -> ByClass:
        """The means (0 where no row had the label), and over how many rows."""
        means = self._sums / self._counts.clamp_min(1)[:, None]
        return ByClass(
            means.cpu().numpy().astype(np.float32), self._counts.cpu().numpy().astype(np.int32)
        )


class Lesson:
    """gamma CE(F_hat_y, p), and what the moving model answered to each label on the way."""

    def __init__(self, edge: Edge, config: ConfigRecord, others: Consensus) -> None:
        """``others``: F_hat (C x C); a class that is not valid adds no loss, or one's own answer."""
        self._gamma = cast(float, config["gamma"]) if others.valid.any() else 0.0
        self._answers, self._own = config["answers"], config["include-self"]
        self._means = torch.from_numpy(others.targets).to(edge.device)
        self._valid = torch.from_numpy(others.valid).to(edge.device)
        self.told = LabelMeans(edge.outputs, edge.outputs, edge.device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The second term of the loss (scalar, a mean over the batch)."""
        said = logits.detach()
        if self._answers == "prob":
            said = soften(said, 1.0)
        self.told.add(said, labels)
        if not self._gamma:
            return logits.new_zeros(())
        valid = self._valid[labels][:, None]
        targets = torch.where(valid, self._means[labels], said)
        if self._answers == "softmax":
            targets = soften(targets, 1.0)
        if not self._own:
            # A target of zeros adds nothing, neither to the loss nor to its gradient.
            targets = targets * valid
        return self._gamma * functional.cross_entropy(logits, targets)


def upload(edge: Edge, content: RecordDict) -> int:
    """Bytes of a mean (float32) and a count (int32) for each class."""
    width = cast(int, content.config_records["config"].get("prototype-dim", edge.outputs))
    return by_class.payload_bytes(edge.outputs, width)[0]


app = client_app(learn, upload)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train; tell F_k and q_k of the steps of this round."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    target = message.content.array_records.get("target")
    others = by_class.unpack_mean(target, edge.outputs, edge.outputs)
    lesson = Lesson(edge, config, others)
    loss = learn(edge, context, OWN, config, lesson, lesson.told.sums)
    told = by_class.pack(lesson.told.result())
    return reply(message, edge, {"train_loss": loss}, {"by-class": told})
