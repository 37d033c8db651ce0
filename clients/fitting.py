"""How large a network fits a device: tried from the largest down, by its memory and by its time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from flwr.app import Context

from clients import memory
from clients.edge import Edge, memory_budget, memory_needed
from clients.private import time_budget
from fedkit.errors import FedkitError
from fedkit.models.build import build_model
from fedkit.models.losses import Loss
from fedkit.models.training import Steps, make_optimiser, one_by_one
from fedkit.report import size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What a network takes on this device.

    Attributes:
        spec: its name.
        memory: bytes of training at its peak, data included.
        seconds: of a round's local training.
    """

    spec: str
    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"{size(self.memory)} of memory and {self.seconds:.3g} s a round"


def largest_that_fits(edge: Edge, context: Context, specs: Iterable[str], loss: Loss) -> Measured:
    """The first of these networks (at least one) within ``--memory-budget`` and ``--time-budget``.

    Raises:
        FedkitError: not even the last one is.
    """
    granted, seconds_granted = memory_budget(context) or math.inf, time_budget(context)
    for spec in specs:
        needed = memory_needed(edge, context, spec)
        if needed > granted:
            lacking = f"{spec} needs {size(needed)} of memory, of {size(int(granted))} granted"
        else:
            measured = Measured(spec, needed, _seconds(edge, context, spec, loss))
            if measured.seconds <= seconds_granted:
                return measured
            lacking = (
                f"{spec} takes {measured.seconds:.3g} s a round, of {seconds_granted:g} granted"
            )
        _log.info("%s.", lacking)
    raise FedkitError(
        f"Nothing of {edge.model_name} fits this device's --memory-budget and --time-budget ({lacking}): "
        "raise them, or take a smaller model or batch at the server."
    )


def _seconds(edge: Edge, context: Context, spec: str, loss: Loss) -> float:
    """What a round of training takes here: the second of two steps, times as many as there are."""
    data = edge.private.train
    batch, steps = memory.recall_round(context, len(data))
    if not steps:
        return 0.0
    some = torch.arange(min(batch, len(data)))
    with torch.random.fork_rng(devices=[]):
        model = build_model(spec, edge.data.shape, edge.outputs, edge.settings.seed).to(edge.device)
        optimiser = make_optimiser("sgd", model, learning_rate=1e-3)
        took = 0.0
        for _ in range(2):
            began = time.perf_counter()
            # Here and now, since others may train beside; its mean loss is there only when a GPU is done.
            one_by_one(Steps(model, data, (data.labels,), loss, optimiser, [some]))
            took = time.perf_counter() - began
    return took * steps
