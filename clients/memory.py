"""What a client remembers between instructions, as records of Flower's ``Context.state``.

``Context.state`` is the only contract: the engine persists it, and a restarted client is rebuilt from
it. Optimiser states are flattened to named arrays, so that nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from torch import nn

from fedkit.data.agreement import Agreement, read_agreement
from fedkit.models.files import About


def keep_model(context: Context, name: str, model: nn.Module) -> None:
    """Put a model's parameters and buffers into the state, as ``NAME-model``."""
    context.state[f"{name}-model"] = ArrayRecord(model.state_dict())


def keep_about(context: Context, about: About) -> None:
    """Put into the state what the models in it are, for whoever reads them without this client."""
    context.state["about"] = ConfigRecord({"json": json.dumps(asdict(about))})


def recall_weights(context: Context, name: str) -> Mapping[str, torch.Tensor] | None:
    """The state dict of a model that the state holds, if it does."""
    record = context.state.get(f"{name}-model")
    return record.to_torch_state_dict() if isinstance(record, ArrayRecord) else None


def keep_agreement(context: Context, agreement: Agreement, batch_size: int) -> None:
    """Put into the state what the server told of the federation at join."""
    told = ConfigRecord({"json": agreement.as_json(), "batch-size": batch_size})
    context.state["agreement"] = told


def recall_agreement(context: Context) -> Agreement | None:
    """What the server told of the federation at join, if it did."""
    record = context.state.config_records.get("agreement")
    return None if record is None else read_agreement(str(record["json"]))


def recall_batch_size(context: Context) -> int:
    """The largest batch that this federation trains with, as the server told it."""
    record = context.state.config_records.get("agreement")
    return 64 if record is None else int(str(record["batch-size"]))


def keep_optimiser(context: Context, name: str, optimiser: torch.optim.Optimizer) -> None:
    """Put an optimiser's moments into the state, as ``NAME-optimiser``."""
    state: dict[int, dict[str, Any]] = optimiser.state_dict()["state"]
    context.state[f"{name}-optimiser"] = ArrayRecord(
        {
            f"{index}/{moment}": Array(torch.as_tensor(value).cpu().numpy())
            for index, moments in state.items()
            for moment, value in moments.items()
            if value is not None
        }
    )


def recall_optimiser(context: Context, name: str, optimiser: torch.optim.Optimizer) -> None:
    """Give an optimiser the moments that the state holds, if any."""
    record = context.state.get(f"{name}-optimiser")
    if not isinstance(record, ArrayRecord):
        return
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, array in record.items():
        index, _, moment = key.partition("/")
        state.setdefault(int(index), {})[moment] = torch.from_numpy(array.numpy())
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
