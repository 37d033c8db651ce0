"""What a client sends of a model that it trained: its weights, its update in fewer bytes, or nothing.

The server's hyper-parameters say how an update travels (``update-codec``), how far it must agree with the
last global update to travel at all (``relevance``), and whether to tell how well its own labels are
explained (``robust``). Only float32 parameters are compressed and compared; running statistics and counters
travel as they are.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from torch import nn

from clients import shared
from clients.common import reply
from clients.edge import OWN, Edge
from clients.probing import default_upload
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.reduction import Arrays
from fedkit.knowledge.relevance import agreement, read_threshold
from fedkit.knowledge.updates import compressed, make_update_codec, sent_bytes
from fedkit.models.build import build_model, parameters_of
from fedkit.models.pretrained import from_scratch

# How their records are named in Context.state.
RESIDUAL, SEEN = "residual", "seen"


def answer(
    message: Message,
    context: Context,
    edge: Edge,
    model: nn.Module,
    trained: ArrayRecord,
    metrics: dict[str, float],
) -> Message:
    """The reply to an instruction that brought weights w, as the server wants it.

    Args:
        message: the instruction.
        context: keeps what is not sent (``topk``), and the last w (``relevance``).
        edge: whose reply it is.
        model: that was trained from w.
        trained: what of it goes back, w_k.
        metrics: to be told beside; with ``robust`` its ``unexplained``, where ``train_loss`` is no single
            network's.
    """
    config = message.content.config_records["config"]
    if config.get("robust", False):
        metrics = {**unexplained(edge, metrics["train_loss"]), **metrics}
    came = message.content.array_records["arrays"]
    codec = make_update_codec(cast(str, config.get("update-codec", "float32")))
    threshold = read_threshold(cast(str, config.get("relevance", "")))
    if codec is None and threshold is None:
        return reply(message, edge, metrics, {"arrays": trained})
    names = compressed(trained, parameters_of(model))
    before = {name: came[name].numpy() for name in names}
    update = {name: trained[name].numpy() - before[name] for name in names}
    if threshold is not None:
        agrees = _relevance(context, before, update)
        skipped = agrees < threshold.at(cast(int, config["server-round"]))
        metrics = {**metrics, "relevance": agrees, "skipped": float(skipped)}
        if skipped:
            return reply(message, edge, metrics)
    if codec is None:
        return reply(message, edge, metrics, {"arrays": trained})
    if RESIDUAL in context.state:
        update = _with_residual(context, update)
    encoded = codec.encode([*update.values()])
    if encoded.rest is not None and all(np.isfinite(tensor).all() for tensor in update.values()):
        context.state[RESIDUAL] = as_record(dict(zip(update, encoded.rest, strict=True)))
    others = {name: array for name, array in trained.items() if name not in update}
    sent = as_record(encoded.arrays)
    return reply(message, edge, metrics, {"update": sent, "arrays": ArrayRecord(others)})


def upload_bytes(edge: Edge, content: RecordDict, slot: str = OWN) -> int:
    """Tensor bytes, at most, of the reply to an instruction with that content.

    Where weights came those of the network in ``slot`` go back.
    """
    if "arrays" not in content.array_records:
        return default_upload(edge, content)
    came, config = content.array_records["arrays"], content.config_records["config"]
    codec = str(config.get("update-codec", "float32"))
    if slot in edge.models:
        model = edge.models[slot]
    else:  # its first instruction makes it
        spec = from_scratch(edge.settings.model)
        model = build_model(spec, edge.data.shape, edge.outputs, seed=0)
    names = shared.returning(model, came, config)
    sent = ArrayRecord({name: came[name] for name in names})
    return sent_bytes(codec, sent, parameters_of(model))


def unexplained(edge: Edge, loss: float) -> dict[str, float]:
    """Which part of its labels' entropy (in nats) a client's loss leaves; nothing where there is none.

    Nor where no epoch was done (FedProx' partial work): that loss is 0, and explains nothing.
    """
    counts = torch.bincount(edge.private.train.labels).double()
    entropy = float(torch.special.entr(counts / counts.sum()).sum())
    return {"unexplained": loss / entropy} if entropy > 0 and loss > 0 else {}


def _relevance(context: Context, before: Arrays, update: Arrays) -> float:
    """e(u, v) with v = w_t - w_s, w_s being the global model that this client trained from last.

    1 where there is nothing to agree with: it has seen no other, or that has not moved since.
    """
    last = context.state.get(SEEN)
    context.state[SEEN] = as_record(before)
    if not isinstance(last, ArrayRecord) or list(last) != list(before):
        return 1.0
    seen = as_arrays(last)
    if any(seen[name].shape != values.shape for name, values in before.items()):
        return 1.0  # another part of the network than last time
    moved = {name: values - seen[name] for name, values in before.items()}
    if not any(values.any() for values in moved.values()):
        return 1.0
    return agreement((update[name], moved[name]) for name in update)


def _with_residual(context: Context, update: Arrays) -> Arrays:
    """An update and what was left of those before; what is left of another part of the network is lost."""
    left = as_arrays(context.state.array_records[RESIDUAL])
    return {
        name: values + left[name] if name in left and left[name].shape == values.shape else values
        for name, values in update.items()
    }
