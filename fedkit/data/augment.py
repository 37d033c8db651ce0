"""What training may do to images at random: mirror, shift and turn them, a batch at a time on the device.

Inputs are normalised (float, n x channels x height x width), so the zeros that come in at the edges are
the data set's mean colour, not black. All draws come from torch's global CPU generator, which clients
seed for every instruction: the same pictures come out on every device.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkit.data.names import AUGMENTATIONS
from fedkit.data.samples import Augment, Shape
from fedkit.errors import UsageError
from fedkit.registry import split, suggest

PADDING = 4  # the field's for 32x32 (He et al. 2016, section 4.2)


def augmentation(spec: str, shape: Shape) -> Augment | None:
    """What ``spec`` names: ``none``, or some of ``flip``, ``crop[:PAD]`` and ``rotate:DEGREES``.

    Args:
        spec: joined by commas, applied in that order.
        shape: of one sample.

    Raises:
        UsageError: there is no such augmentation, its number makes no sense, or the samples are no
            images.
    """
    if spec == "none":
        return None
    steps = [_step(part.strip(), shape) for part in spec.split(",")]
    return partial(_in_turn, steps)


def flip(inputs: Tensor) -> Tensor:
    """Each image as it is or mirrored left to right, with equal chances; in place."""
    mirrored = (torch.rand(len(inputs)) < 0.5).nonzero().flatten().to(inputs.device)
    return inputs.index_copy_(0, mirrored, inputs[mirrored].flip(-1))


def crop(inputs: Tensor, padding: int) -> Tensor:
    """Each image shifted by up to ``padding`` pixels each way, uniformly, within a border of zeros."""
    count, _, height, width = inputs.shape
    # Drawn on the CPU, used on the device.
    top, left = torch.randint(2 * padding + 1, (2, count)).to(inputs.device)
    # Every window there is, as views; only those that were drawn are copied.
    windows = F.pad(inputs, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=inputs.device), :, top, left]


def rotate(inputs: Tensor, degrees: float) -> Tensor:
    """Each image turned about its centre by up to ``degrees`` either way, uniformly (bilinear)."""
    count, _, height, width = inputs.shape
    angle = ((2 * torch.rand(count) - 1) * torch.pi * degrees / 180).to(inputs.device)
    cosine, sine, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid counts both sides from -1 to 1, so that a turn of an oblong image is none in the grid.
    across = torch.stack([cosine, -sine * height / width, none], dim=1)
    down = torch.stack([sine * width / height, cosine, none], dim=1)
    grid = F.affine_grid(
        torch.stack([across, down], dim=1), list(inputs.shape), align_corners=False
    )
    return F.grid_sample(inputs, grid, align_corners=False)


def _in_turn(steps: list[Augment], inputs: Tensor) -> Tensor:
    for step in steps:
        inputs = step(inputs)
    return inputs


def _step(spec: str, shape: Shape) -> Augment:
    name, argument = split(spec)
    if name not in AUGMENTATIONS:
        raise UsageError(f"There is no augmentation {name!r}{suggest(name, AUGMENTATIONS)}.")
    if len(shape) != 3:
        raise UsageError(f"The augmentation {spec} is for images; these samples are none.")
    if name == "flip" and argument is None:
        return flip
    if name == "crop":
        return partial(crop, padding=_pixels(argument, min(shape[1:])))
    if name == "rotate":
        return partial(rotate, degrees=_degrees(argument))
    raise UsageError(
        "none stands alone, without a number." if name == "none" else "flip takes no number."
    )


def _pixels(argument: str | None, side: int) -> int:
    if argument is None:
        return min(PADDING, side - 1)
    if not argument.isdecimal() or not 0 < int(argument) < side:
        raise UsageError(
            f"crop:PAD takes 1 to {side - 1} pixels for these images, not {argument!r}."
        )
    return int(argument)


def _degrees(argument: str | None) -> float:
    try:
        degrees = float(argument or "")
    except ValueError:
        degrees = -1.0
    if not 0 <= degrees <= 180:
        raise UsageError(f"rotate:DEGREES takes a number from 0 to 180, not {argument or ''!r}.")
    return degrees
