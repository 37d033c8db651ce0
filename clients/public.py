"""The public subset of a round, as a client meets it: asked for answers on it, then given targets."""

from __future__ import annotations

from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor

from clients.edge import Edge
from fedkit.data.samples import Samples
from fedkit.knowledge import codecs, subset


def asked(message: Message, context: Context, edge: Edge) -> Samples:
    """The samples of the subset in an instruction, which is kept for the targets that follow.

    Raises:
        ValueError: the subset is no list of indices into the public set.
    """
    record = message.content.array_records["subset"]
    indices = subset.read(record, len(edge.public))
    context.state["subset"] = record
    return edge.public.take(torch.from_numpy(indices))


def answer(context: Context, edge: Edge, logits: Tensor) -> dict[str, ArrayRecord | ConfigRecord]:
    """Logits (M x C) on the subset just asked for, as records of a reply."""
    indices = subset.read(context.state.array_records["subset"], len(edge.public))
    return {
        "logits": codecs.pack(edge.settings.codec, logits.cpu().numpy()),
        "answer": ConfigRecord({"subset-digest": subset.digest(indices)}),
    }


def targets(message: Message, context: Context, edge: Edge, name: str) -> tuple[Samples, Tensor]:
    """The subset that was answered, and the targets (float32, M x C) in an instruction.

    Raises:
        ValueError: the targets belong to another subset, or are no M x C finite numbers.
    """
    config = message.content.config_records["config"]
    indices = subset.read(context.state.array_records["subset"], len(edge.public))
    if subset.digest(indices) != cast(str, config["subset-digest"]):
        raise ValueError("the targets belong to another public subset than the one answered")
    record = message.content.array_records[name]
    logits = codecs.unpack(edge.settings.codec, record, len(indices), edge.outputs)
    return edge.public.take(torch.from_numpy(indices)), torch.from_numpy(logits).to(edge.device)
