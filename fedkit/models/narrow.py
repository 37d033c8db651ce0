"""A network at a fraction of its width, by name: ``width:0.25:resnet18``.

Every tensor has the shape, and at first the numbers, of a part of the whole network's, under the same name
(``fedkit.models.slicing``).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedkit.errors import UsageError
from fedkit.models.build import drawn_now
from fedkit.models.slicing import slicing_of
from fedkit.registry import split

NAME, DEFAULT = "width", "0.25:cnn"
# A level of a network that is narrow itself; each costs as much as what it is made of, twice.
DEEPEST = 2


def width(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A network with a share of the channels of its hidden layers, width:0.25:resnet18.

    Small images: as the network that it is made of (a quarter of cnn, if none is named).

    It starts with a part of that network's initial weights.
    """
    share, spec = parts(argument)
    slicing = slicing_of(spec, tuple(shape), classes)
    if torch.empty(0).is_meta:  # only its shapes are asked for
        return slicing.network(share)
    whole = drawn_now(spec, shape, classes).state_dict()
    kept = slicing.take({name: tensor.numpy() for name, tensor in whole.items()}, share)
    return slicing.network(share, {name: torch.from_numpy(array) for name, array in kept.items()})


def at_width(spec: str, share: float) -> str:
    """The name of a network at a share of its width; its own where that is 1."""
    return spec if share == 1 else f"{NAME}:{share:g}:{spec}"


def width_of(spec: str) -> float:
    """The share of its width that ``spec`` names a network at; 1 if it names a whole one."""
    name, argument = split(spec)
    return parts(argument)[0] if name == NAME else 1.0


def whole_of(spec: str) -> str:
    """The name of the whole network of which ``spec`` names one at some width."""
    name, argument = split(spec)
    return parts(argument)[1] if name == NAME else spec


def parts(argument: str | None) -> tuple[float, str]:
    """Width and network in ``0.25:resnet18``.

    Raises:
        UsageError: the width is not in (0, 1], or no network is named, or widths of widths of widths.
    """
    text, _, spec = (argument or DEFAULT).partition(":")
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not (0 < share <= 1 and spec):
        raise UsageError(
            f"The model {NAME} takes a width above 0 and up to 1 and a network's name after it, as in "
            f"{NAME}:{DEFAULT}, not {argument!r}."
        )
    if spec.count(f"{NAME}:") >= DEEPEST:
        raise UsageError(
            f"{NAME}:{argument} is a width of a width of a width: give the product of them as one."
        )
    return share, spec
