"""torchvision's networks with the stem that the field uses for small images.

The originals read 224x224 images and shrink them fourfold at once; up to 64x64 the first convolution
keeps the size (3x3, stride 1) and the first pooling is left out, as usual for CIFAR.
"""

from __future__ import annotations

from torch import nn

from fedkit.errors import UsageError
from fedkit.models.build import no_argument

SMALL = 64


def resnet18(shape: tuple[int, int, int], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ResNet-18 (11 million parameters), small-image stem up to 64x64."""
    from torchvision.models import resnet18 as torchvision_resnet18

    no_argument("resnet18", argument)
    channels, height, width = shape
    model: nn.Module = torchvision_resnet18(num_classes=classes)
    if max(height, width) <= SMALL:
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def shufflenet(shape: tuple[int, int, int], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ShuffleNetV2, small-image stem; shufflenet:0.5, :1.0 (default), :1.5 or :2.0."""
    from torchvision import models

    width_name = {"0.5": "x0_5", "1.0": "x1_0", "1.5": "x1_5", "2.0": "x2_0"}.get(argument or "1.0")
    if width_name is None:
        raise UsageError(f"shufflenet takes the width 0.5, 1.0, 1.5 or 2.0, not {argument!r}.")
    channels, height, width = shape
    model: nn.Module = getattr(models, f"shufflenet_v2_{width_name}")(num_classes=classes)
    small = max(height, width) <= SMALL
    if small or channels != 3:
        first = nn.Conv2d(channels, 24, 3, stride=1 if small else 2, padding=1, bias=False)
        model.get_submodule("conv1")[0] = first  # type: ignore[operator]
    if small:
        model.maxpool = nn.Identity()
    return model
