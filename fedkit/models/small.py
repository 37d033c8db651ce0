"""Small networks that train on any device: LeNet, plain CNNs, perceptrons, logistic regression."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fedkit.errors import UsageError
from fedkit.models.arguments import no_argument, one_of, sizes
from fedkit.models.pooling import HalvingMaxPool2d
from fedkit.models.reads import check_numbers, image_shape

# Below this an unpadded 3x3 convolution, twice with pooling, leaves nothing for a third one.
UNPADDED_LEAST = 18


def lenet(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; lenet:batch or lenet:group normalises each convolution.

    Small images: convolutions padded, whatever the size.

    The original reads 32x32 and pads nothing; of 8x8 that would leave nothing to pool.
    """
    channels, height, width = image_shape("lenet", shape, least=4)
    flat = 16 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        *_norm(argument, 6),
        nn.ReLU(),
        HalvingMaxPool2d(),
        nn.Conv2d(6, 16, 5, padding=2),
        *_norm(argument, 16),
        nn.ReLU(),
        HalvingMaxPool2d(),
        nn.Flatten(),
        nn.Linear(flat, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def cnn(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A small CNN: 3x3 convolutions of 32 and 64 channels, each pooled, and 128 hidden units.

    Small images: as they are.
    """
    no_argument("cnn", argument)
    channels, height, width = image_shape("cnn", shape, least=4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        HalvingMaxPool2d(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        HalvingMaxPool2d(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def cnn1(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """FedDistill's CNN1: 3x3 convolutions of 32, 64, 64 and 64 hidden units; cnn1:wide puts 1024 before.

    Small images: convolutions padded below 18x18.

    Unpadded from there on, as in the paper (Jiang, Shan and Zhang 2020). It lists "FC 1024 and 64"; 1024 is
    also what its convolutions leave of 32x32 images, so that only 64 need be a layer of its own: that is
    ``cnn1``, and ``cnn1:wide`` is the literal reading.
    """
    wide = one_of("cnn1", argument, ["wide"])
    return _feddistill("cnn1", shape, classes, (32, 64, 64), (1024, 64) if wide else (64,))


def cnn2(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """FedDistill's CNN2: three 3x3 convolutions of 128 channels; cnn2:wide adds 2048 hidden units.

    Small images: convolutions padded below 18x18.

    Unpadded from there on, as in the paper (Jiang, Shan and Zhang 2020). It lists "FC 2048", which is also
    what its convolutions leave of 32x32 images: ``cnn2`` has no hidden layer behind them, and ``cnn2:wide``
    is the literal reading.
    """
    wide = one_of("cnn2", argument, ["wide"])
    return _feddistill("cnn2", shape, classes, (128, 128, 128), (2048,) if wide else ())


def logistic(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """Logistic regression on features or pixels (FedProx' network for its synthetic data and MNIST)."""
    no_argument("logistic", argument)
    return nn.Sequential(_Flat("logistic"), nn.Linear(math.prod(shape), classes))


def mlp(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A perceptron on features or pixels; mlp:64 has one hidden layer of 64 units.

    Without an argument two of 200 with ReLU, which on MNIST is the 2NN of FedAvg's paper (McMahan et
    al. 2017).
    """
    layers: list[nn.Module] = [_Flat("mlp")]
    inputs = math.prod(shape)
    for hidden in sizes("mlp", argument, (200, 200)):
        layers += [nn.Linear(inputs, hidden), nn.ReLU()]
        inputs = hidden
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _feddistill(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    convolutions: tuple[int, int, int],
    hidden: tuple[int, ...],
) -> nn.Module:
    channels, height, width = image_shape(name, shape, least=4)
    padding = 1 if min(height, width) < UNPADDED_LEAST else 0
    layers: list[nn.Module] = []
    for number, outputs in enumerate(convolutions):
        layers += [nn.Conv2d(channels, outputs, 3, padding=padding), nn.ReLU()]
        height, width = height - 2 + 2 * padding, width - 2 + 2 * padding
        if number < 2:
            layers.append(HalvingMaxPool2d())
            height, width = height // 2, width // 2
        channels = outputs
    layers.append(nn.Flatten())
    inputs = channels * height * width
    for units in hidden:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class _Flat(nn.Module):
    """Each sample as one row of numbers; refuses tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        check_numbers(self.name, inputs)
        return inputs.flatten(1)


def _norm(kind: str | None, channels: int) -> list[nn.Module]:
    if kind is None or kind == "none":
        return []
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "group":
        return [nn.GroupNorm(2, channels)]
    raise UsageError(f"lenet takes none, batch or group as its normalisation, not {kind!r}.")
