"""Small networks that train on any device."""

from __future__ import annotations

from torch import nn

from fedkit.errors import UsageError
from fedkit.models.build import no_argument


def lenet(shape: tuple[int, int, int], classes: int, argument: str | None = None) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; lenet:batch or lenet:group normalises each convolution.

    Both 5x5 convolutions are padded, so that 8x8 images leave something to pool (the original
    reads 32x32 and pads nothing).
    """
    channels, height, width = shape
    flat = 16 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        *_norm(argument, 6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        *_norm(argument, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(flat, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def cnn(shape: tuple[int, int, int], classes: int, argument: str | None = None) -> nn.Module:
    """A small CNN: 3x3 convolutions of 32 and 64 channels, each pooled, and 128 hidden units."""
    no_argument("cnn", argument)
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def _norm(kind: str | None, channels: int) -> list[nn.Module]:
    if kind is None or kind == "none":
        return []
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        return [nn.GroupNorm(2, channels)]
    raise UsageError(f"lenet takes none, batch or group as its normalisation, not {kind!r}.")
