"""HeteroFL's image networks (Diao et al. 2021, and the authors' code), whose width and depth can be sliced.

At width W a hidden layer of w channels keeps the first ceil(W w); the image's channels and the logits are
never sliced. Every tensor of a narrow network then has the shape of a prefix of the wide one's, under the
same name. Of a pre-activation ResNet the first D of four stages can be kept, which leaves out names and
shortens ``head``; the head reads other features at each depth, so whoever averages over depths keeps
``head.`` apart.

What HeteroFL adds in training (scaler, static normalisation, masked loss) is the strategy's business.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from fedkit.errors import UsageError
from fedkit.models.arguments import norm_and_depth, split_width
from fedkit.models.pooling import HalvingMaxPool2d
from fedkit.models.reads import image_shape

HIDDEN = (64, 128, 256, 512)
GROUPS = 4


def heterofl_cnn(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """HeteroFL's CNN: four 3x3 convolutions, 64 to 512 channels; heterofl-cnn:0.25 or :0.25,group.

    Small images: as they are, from 8x8.

    Normalisation ``batch`` (default), ``group`` (4 groups) or ``none``. Each convolution but the last is
    pooled; 1,556,874 parameters for MNIST.
    """
    name = "heterofl-cnn"
    channels, _, _ = image_shape(name, shape, least=8)
    width, words = split_width(name, argument)
    norm, _ = norm_and_depth(name, words, deepest=None)
    layers: list[nn.Module] = []
    for hidden in _hidden(width):
        layers += [
            nn.Conv2d(channels, hidden, 3, padding=1),
            _norm(name, norm, hidden),
            nn.ReLU(),
            HalvingMaxPool2d(),
        ]
        channels = hidden
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), _logits(channels, classes))


def preresnet18(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """Pre-activation ResNet-18 of HeteroFL's later code; preresnet18:0.5, :0.5,group, :0.5,depth=2.

    Small images: 3x3 stem of stride 1, as for large ones.

    Blocks 2,2,2,2; 11,172,170 parameters for CIFAR-10. Normalisation as in heterofl-cnn.
    """
    return _preresnet("preresnet18", (2, 2, 2, 2), shape, classes, argument)


def preresnet_1112(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """The pre-activation ResNet of HeteroFL's published table; preresnet-1112:0.5, as preresnet18.

    Small images: 3x3 stem of stride 1, as for large ones.

    Blocks 1,1,1,2; 9,622,090 parameters for CIFAR-10 (36.7 MB). The authors corrected the blocks to
    2,2,2,2 after publication.
    """
    return _preresnet("preresnet-1112", (1, 1, 1, 2), shape, classes, argument)


def _preresnet(
    name: str,
    blocks: tuple[int, int, int, int],
    shape: tuple[int, ...],
    classes: int,
    argument: str | None,
) -> nn.Module:
    channels, _, _ = image_shape(name, shape)
    width, words = split_width(name, argument)
    norm, depth = norm_and_depth(name, words, deepest=len(blocks))
    hidden = _hidden(width)[:depth]
    # The names are the authors', but for the head's common prefix.
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(channels, hidden[0], 3, padding=1, bias=False))
    inputs = hidden[0]
    for stage, (outputs, many) in enumerate(zip(hidden, blocks, strict=False), start=1):
        made = []
        for number in range(many):
            stride = 2 if stage > 1 and number == 0 else 1
            made.append(_Block(name, norm, inputs, outputs, stride))
            inputs = outputs
        model.add_module(f"layer{stage}", nn.Sequential(*made))
    head = nn.Sequential()
    head.add_module("norm", _norm(name, norm, inputs))
    head.add_module("relu", nn.ReLU())
    head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    head.add_module("flatten", nn.Flatten())
    head.add_module("linear", _logits(inputs, classes))
    model.add_module("head", head)
    return model


class _Block(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, beside a shortcut."""

    def __init__(self, name: str, norm: str, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.n1 = _norm(name, norm, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.n2 = _norm(name, norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = functional.relu(self.n1(images))
        beside = images if self.shortcut is None else self.shortcut(active)
        changed: Tensor = self.conv2(functional.relu(self.n2(self.conv1(active))))
        return changed + beside


def _hidden(width: float) -> tuple[int, ...]:
    return tuple(math.ceil(width * channels) for channels in HIDDEN)


def _logits(inputs: int, classes: int) -> nn.Linear:
    # As the authors start it.
    layer = nn.Linear(inputs, classes)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(name: str, kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if channels % GROUPS:
        raise UsageError(
            f"{name} at this width has a layer of {channels} channels, which {GROUPS} groups don't "
            "divide: take another width, or batch or none."
        )
    return nn.GroupNorm(GROUPS, channels)
