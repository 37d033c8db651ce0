"""What a client itself would use of a global model: a copy that learned a little more on its own data."""

from __future__ import annotations

import copy
from typing import cast

from flwr.app import ConfigRecord, Context
from torch import nn

from clients.edge import Edge
from clients.private import train_private

TUNED = "tuned"


def fine_tuned(
    edge: Edge, context: Context, config: ConfigRecord, model: nn.Module
) -> nn.Module | None:
    """A copy of the global model after ``finetune-epochs`` on the private data; None where there are none.

    It is measured and let go of: nothing of it is sent or kept, so the next round does not know of it.
    """
    epochs = cast(int, config["finetune-epochs"])
    if not epochs:
        return None
    edge.models[TUNED] = copy.deepcopy(model)
    train_private(edge, context, TUNED, in_passing(config), "finetune", epochs)
    return edge.models.pop(TUNED)


def in_passing(config: ConfigRecord) -> ConfigRecord:
    """The config for training that is no round's: neither schedule nor moments are to remember it."""
    passing = ConfigRecord({**config, "keep-optimiser": False, "warmup": 0})
    passing["schedule"], passing["schedule-by"] = "constant", "round"
    return passing
