"""What a client remembers between instructions, as records of Flower's ``Context.state``.

``Context.state`` is the only contract: the engine persists it, and a restarted client is rebuilt from
it. Optimiser states are flattened to named arrays, so that nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import nn

from fedkit.data.agreement import Agreement, read_agreement
from fedkit.knowledge.arrays import as_arrays, as_record, as_state_dict, from_state_dict
from fedkit.models.moments import give_moments, moments_of
from fedkit.models.normalisation import statistics_of
from fedkit.models.training import batches_of


def keep_model(context: Context, name: str, model: nn.Module) -> None:
    """Put a model's parameters and buffers into the state, as ``NAME-model``."""
    context.state[f"{name}-model"] = from_state_dict(model.state_dict())


def keep_part(context: Context, name: str, architecture: str) -> None:
    """Put into the state which part of the client's network ``NAME-model`` is, by its name."""
    context.state[f"{name}-part"] = ConfigRecord({"architecture": architecture})


def recall_part(context: Context, name: str) -> str | None:
    """Which part of the client's network ``NAME-model`` is, if that is known."""
    record = context.state.config_records.get(f"{name}-part")
    return None if record is None else str(record["architecture"])


def keep_statistics(context: Context, name: str, architecture: str, model: nn.Module) -> None:
    """Put a model's running statistics into the state: those of ``NAME``, as that architecture."""
    state = model.state_dict()
    own = {key: state[key] for key in sorted(statistics_of(model))}
    if own:
        context.state[f"{name}-statistics/{architecture}"] = from_state_dict(own)


def recall_statistics(context: Context, name: str, architecture: str) -> Mapping[str, torch.Tensor]:
    """The running statistics of ``NAME``, as that architecture, that the state holds; else none."""
    record = context.state.get(f"{name}-statistics/{architecture}")
    return as_state_dict(record) if isinstance(record, ArrayRecord) else {}


def keep_about(context: Context, about: ConfigRecord) -> None:
    """Put into the state what the models in it are, for whoever reads them without this client."""
    context.state["about"] = about


def recall_weights(context: Context, name: str) -> Mapping[str, torch.Tensor] | None:
    """The state dict of a model that the state holds, if it does."""
    record = context.state.get(f"{name}-model")
    return as_state_dict(record) if isinstance(record, ArrayRecord) else None


def keep_agreement(
    context: Context, agreement: Agreement, batch_size: int, epochs: int, steps: int
) -> None:
    """Put into the state what the server told of the federation at join."""
    work = {"batch-size": batch_size, "epochs": epochs, "steps": steps}
    context.state["agreement"] = ConfigRecord({"json": agreement.as_json(), **work})


def keep_levels(context: Context, levels: str) -> None:
    """Put into the state at which widths this federation trains, as the server told it at join."""
    context.state["levels"] = ConfigRecord({"levels": levels})


def recall_levels(context: Context) -> str:
    """At which widths this federation trains, with commas between; 1 if nothing was told."""
    record = context.state.config_records.get("levels")
    return str(record["levels"]) if record is not None else "1"


def recall_agreement(context: Context) -> Agreement | None:
    """What the server told of the federation at join, if it did."""
    record = context.state.config_records.get("agreement")
    return None if record is None else read_agreement(str(record["json"]))


def recall_batch_size(context: Context) -> int:
    """The largest batch that this federation trains with, as the server told it."""
    record = context.state.config_records.get("agreement")
    return 64 if record is None else int(str(record["batch-size"]))


def recall_round(context: Context, samples: int) -> tuple[int, int]:
    """The largest batch, and how many of these a round's training on so many samples takes."""
    record, batch = context.state.config_records.get("agreement"), recall_batch_size(context)
    if record is None:
        return batch, batches_of(samples, batch)
    epochs, steps = int(str(record["epochs"])), int(str(record["steps"]))
    return batch, steps or epochs * batches_of(samples, batch)


def keep_optimiser(context: Context, name: str, optimiser: torch.optim.Optimizer) -> None:
    """Put an optimiser's moments into the state, as ``NAME-optimiser``."""
    context.state[f"{name}-optimiser"] = as_record(moments_of(optimiser))


def recall_optimiser(context: Context, name: str, optimiser: torch.optim.Optimizer) -> None:
    """Give an optimiser the moments that the state holds, if any."""
    record = context.state.get(f"{name}-optimiser")
    if isinstance(record, ArrayRecord):
        give_moments(optimiser, as_arrays(record))
