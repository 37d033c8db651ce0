"""torchvision's default weights (ImageNet) in a network that was fitted to other images and classes.

Kept is every tensor whose name and shape are those of the original. Drawn from the seed as ever are the
last layer, unless there are 1,000 classes; the first convolution of ResNets and AlexNet for small images,
and of every network for other than three channels; and AlexNet's ``classifier.1`` for images up to 40x40,
whose grid is smaller. Images are normalised as the data set says, not as ImageNet.

The files are looked for where torch.hub keeps them (``TORCH_HOME``, else ``~/.cache/torch``), and
downloaded where the machine may.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from fedkit.errors import FedkitError, UsageError
from fedkit.registry import code_of

PRETRAINED = "pretrained"


def words(name: str, argument: str | None, choices: Collection[str]) -> tuple[str | None, bool]:
    """One of ``choices`` and whether ``pretrained`` stands beside it, both optional.

    Raises:
        UsageError: the argument is anything else.
    """
    found = argument.split(",") if argument is not None else []
    others = [word for word in found if word != PRETRAINED]
    if len(others) > 1 or len(found) - len(others) > 1 or not set(others) <= set(choices):
        raise UsageError(
            f"The model {name} takes one of {', '.join(choices)}, and {PRETRAINED}, not {argument!r}."
        )
    return (others[0] if others else None), len(others) < len(found)


def from_scratch(spec: str) -> str:
    """The same network without its pre-trained weights: for one whose weights come from elsewhere."""
    if code_of("models", spec) is not None:
        return spec  # what its argument means is the user's own business
    # The last colon: what stands before may have one of its own (exits:2:resnet18).
    name, colon, argument = spec.rpartition(":")
    if not colon or PRETRAINED not in argument.split(","):
        return spec
    kept = [word for word in argument.split(",") if word not in ("", PRETRAINED)]
    return f"{name}:{','.join(kept)}" if kept else name


def load_pretrained(model: nn.Module, name: str) -> nn.Module:
    """Put torchvision's default weights of ``name`` into ``model`` where they fit; returns ``model``.

    A model on the meta device, which has no weights, stays as it is.

    Raises:
        FedkitError: the weights can't be had, or are damaged; the sentence names the file.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    own = model.state_dict()
    published = _download(name)
    fitting = {
        key: tensor
        for key, tensor in published.items()
        if key in own and own[key].shape == tensor.shape
    }
    model.load_state_dict(own | fitting)
    return model


def import_torchvision(name: str) -> Any:
    """torchvision's module of networks, for the network ``name``; nothing else here needs torchvision.

    Raises:
        UsageError: it is not installed, or was built for another torch.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators miss their torch
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        told = "is not installed here" if missing else f"can't be loaded ({error})"
        raise UsageError(
            f"{name} is one of torchvision's networks, and torchvision {told}: install the one that "
            f"belongs to torch {torch.__version__}, or take a network that needs none, as lenet or cnn."
        ) from error
    return models


def _download(name: str) -> dict[str, torch.Tensor]:
    weights: Any = import_torchvision(name).get_model_weights(name)
    url = str(weights.DEFAULT.url)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    try:
        state: object = torch.hub.load_state_dict_from_url(
            url, model_dir=str(folder), progress=False, check_hash=True, weights_only=True
        )
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except Exception as error:  # no network, no disk, a file that is no checkpoint, a wrong hash
        told = type(error).__name__
        if path.exists():  # torch's own sentence would advise to trust the file
            found = f"can't be read ({told})"
        else:
            found = f"are not here and can't be downloaded ({told}: {error})"
        raise FedkitError(
            f"The pre-trained weights of {name} {found}: get {url} and put it at {path}."
        ) from error
    return state
