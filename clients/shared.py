"""What of a network is shared, and what stays on its device.

The server says what is shared by what it sends: what does not come is the client's own, and what came goes
back. Only tensors of normalisation layers may stay (``buffers=local``, FedBN), so that an incomplete
network is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor, nn

from fedkit.knowledge.arrays import from_state_dict
from fedkit.models.normalisation import normalisation_of, statistics_of, untracked


def load(model: nn.Module, came: Mapping[str, Tensor]) -> None:
    """Load the tensors that came; the others of the model stay as they are.

    Raises:
        ValueError: more than normalisation layers stays.
        RuntimeError: they are another network's.
    """
    model.load_state_dict({**staying(model, came), **came})


def staying(model: nn.Module, came: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors that did not come, by name.

    Raises:
        ValueError: there are others than those of normalisation layers.
    """
    stays = {name: own for name, own in model.state_dict().items() if name not in came}
    if stays and (lacking := stays.keys() - normalisation_of(model)):
        raise ValueError(f"the server sent no {min(lacking)}, which is no normalisation layer's")
    return stays


def completed(model: nn.Module, came: Mapping[str, Tensor]) -> nn.Module:
    """A network like ``model``, with the tensors that came and its own where none came.

    Raises:
        ValueError, RuntimeError: as ``load``.
    """
    network = copy.deepcopy(model)
    load(network, came)
    return network


def training(model: nn.Module, config: ConfigRecord) -> AbstractContextManager[None]:
    """Within it the model trains as ``buffers`` wants: ``static`` tracks no running statistics."""
    return untracked(model) if _static(config) else nullcontext()


def returning(model: nn.Module, came: ArrayRecord, config: ConfigRecord) -> list[str]:
    """The names of what goes back once the model was trained: what came, but for static statistics."""
    stays = statistics_of(model) if _static(config) else frozenset()
    return [name for name in came if name not in stays]


def back(model: nn.Module, came: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
    """What goes back, of a model that was trained."""
    state = model.state_dict()
    return from_state_dict({name: state[name] for name in returning(model, came, config)})


def _static(config: ConfigRecord) -> bool:
    return config.get("buffers") == "static"
