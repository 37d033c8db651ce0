"""torchvision's networks, fitted to small images by their stem: no image is resized.

The originals read 224x224 images and halve them five times. Up to 64x64 the first two halvings are left
out, as usual for CIFAR (3x3 convolution of stride 1 at the start, no first pooling): 32x32 ends as 4x4, and
8x8 as 1x1. Larger images are read in the original form. One channel gives the first convolution one.

With ``pretrained`` the weights are torchvision's default ones for ImageNet where they fit
(``fedkit.models.pretrained``).
"""

from __future__ import annotations

from torch import nn

from fedkit.models.arguments import no_argument, one_of
from fedkit.models.pretrained import PRETRAINED, import_torchvision, load_pretrained, words
from fedkit.models.reads import image_shape

SMALL = 64
WIDTHS = {"0.5": "x0_5", "1.0": "x1_0", "1.5": "x1_5", "2.0": "x2_0"}


def resnet18(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ResNet-18 (11 million parameters); resnet18:pretrained.

    Small images: 3x3 stem of stride 1, no first pooling.
    """
    return _resnet("resnet18", shape, classes, argument)


def resnet34(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ResNet-34 (21 million parameters); resnet34:pretrained.

    Small images: 3x3 stem of stride 1, no first pooling.
    """
    return _resnet("resnet34", shape, classes, argument)


def resnet50(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ResNet-50 (24 million parameters, bottleneck blocks); resnet50:pretrained.

    Small images: 3x3 stem of stride 1, no first pooling.
    """
    return _resnet("resnet50", shape, classes, argument)


def shufflenet(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's ShuffleNetV2; shufflenet:0.5, :1.0 (default), :1.5 or :2.0; shufflenet:1.0,pretrained.

    Small images: stem of stride 1, no first pooling.
    """
    width, pretrained = words("shufflenet", argument, WIDTHS)
    return _shufflenet(WIDTHS[width or "1.0"], shape, classes, pretrained)


def shufflenet_v2_x0_5(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """shufflenet:0.5 by torchvision's name; also :pretrained.

    Small images: stem of stride 1, no first pooling.
    """
    return _shufflenet("x0_5", shape, classes, _pretrained("shufflenet_v2_x0_5", argument))


def shufflenet_v2_x1_0(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """shufflenet:1.0 by torchvision's name; also :pretrained.

    Small images: stem of stride 1, no first pooling.
    """
    return _shufflenet("x1_0", shape, classes, _pretrained("shufflenet_v2_x1_0", argument))


def shufflenet_v2_x1_5(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """shufflenet:1.5 by torchvision's name; also :pretrained.

    Small images: stem of stride 1, no first pooling.
    """
    return _shufflenet("x1_5", shape, classes, _pretrained("shufflenet_v2_x1_5", argument))


def shufflenet_v2_x2_0(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """shufflenet:2.0 by torchvision's name; also :pretrained.

    Small images: stem of stride 1, no first pooling.
    """
    return _shufflenet("x2_0", shape, classes, _pretrained("shufflenet_v2_x2_0", argument))


def mobilenet_v2(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's MobileNetV2; mobilenet_v2:pretrained.

    Small images: stem and first strided block of stride 1.
    """
    return _mobile("mobilenet_v2", shape, classes, argument)


def mobilenet_v3_small(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """torchvision's MobileNetV3, small; mobilenet_v3_small:pretrained.

    Small images: stem and first strided block of stride 1.
    """
    return _mobile("mobilenet_v3_small", shape, classes, argument)


def mobilenet_v3_large(
    shape: tuple[int, ...], classes: int, argument: str | None = None
) -> nn.Module:
    """torchvision's MobileNetV3, large; mobilenet_v3_large:pretrained.

    Small images: stem and first strided block of stride 1.
    """
    return _mobile("mobilenet_v3_large", shape, classes, argument)


def efficientnet_b0(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's EfficientNet-B0; efficientnet_b0:pretrained.

    Small images: stem and first strided block of stride 1.
    """
    return _mobile("efficientnet_b0", shape, classes, argument)


def alexnet(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """torchvision's AlexNet; alexnet:pretrained.

    Small images: 3x3 stem of stride 1, poolings padded, grid up to 6x6.

    The original starts with 11x11 of stride 4 and brings every image to a grid of 6x6, which it would fill
    with copies; here a smaller grid stays as it is (4x4 for 32x32, 1x1 for 8x8) and the first linear layer
    fits it.
    """
    channels, height, width = image_shape("alexnet", shape)
    pretrained = _pretrained("alexnet", argument)
    model = _torchvision("alexnet", classes)
    if max(height, width) <= SMALL:
        _put(model, "features.0", nn.Conv2d(channels, 64, 3, padding=1))
        for module in model.modules():
            if isinstance(module, nn.MaxPool2d):
                module.padding = 1
        # Each of the three poolings halves, and rounds up.
        grid = min(6, -(-height // 8)), min(6, -(-width // 8))
        _put(model, "avgpool", nn.AdaptiveAvgPool2d(grid))
        if grid != (6, 6):
            _put(model, "classifier.1", nn.Linear(256 * grid[0] * grid[1], 4096))
    elif channels != 3:
        _put(model, "features.0", nn.Conv2d(channels, 64, 11, stride=4, padding=2))
    return load_pretrained(model, "alexnet") if pretrained else model


def vit(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A small vision transformer: torchvision's, half as deep as ViT-Ti (6 layers of 192, 3 heads).

    Small images: patches fitted: 2x2 pixels for 8x8, 4x4 for 32x32.

    A grid of at most 8x8 patches up to 64x64, patches of 16x16 beyond. What is no square, or no whole
    number of patches, gets zeros (the mean colour) below and on the right. ViT-Ti: Touvron et al. 2021.
    """
    no_argument("vit", argument)
    import_torchvision("vit")
    from fedkit.models.vit import SliceableVisionTransformer

    channels, height, width = image_shape("vit", shape)
    longest = max(height, width)
    patch = max(2, -(-longest // 8)) if longest <= SMALL else 16
    side = -(-longest // patch) * patch
    model: nn.Module = SliceableVisionTransformer(
        image_size=side,
        patch_size=patch,
        num_layers=6,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=classes,
    )
    if channels != 3:
        _put(model, "conv_proj", nn.Conv2d(channels, 192, patch, stride=patch))
    if (height, width) == (side, side):
        return model
    return nn.Sequential(nn.ZeroPad2d((0, side - width, 0, side - height)), model)


def _resnet(name: str, shape: tuple[int, ...], classes: int, argument: str | None) -> nn.Module:
    channels, height, width = image_shape(name, shape)
    pretrained = _pretrained(name, argument)
    model = _torchvision(name, classes)
    if max(height, width) <= SMALL:
        _put(model, "conv1", nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False))
        _put(model, "maxpool", nn.Identity())
    elif channels != 3:
        _put(model, "conv1", nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False))
    return load_pretrained(model, name) if pretrained else model


def _shufflenet(
    width_name: str, shape: tuple[int, ...], classes: int, pretrained: bool
) -> nn.Module:
    name = f"shufflenet_v2_{width_name}"
    channels, height, width = image_shape(name, shape)
    model = _torchvision(name, classes)
    small = max(height, width) <= SMALL
    if small or channels != 3:
        first = nn.Conv2d(channels, 24, 3, stride=1 if small else 2, padding=1, bias=False)
        _put(model, "conv1.0", first)
    if small:
        _put(model, "maxpool", nn.Identity())
    return load_pretrained(model, name) if pretrained else model


def _mobile(name: str, shape: tuple[int, ...], classes: int, argument: str | None) -> nn.Module:
    channels, height, width = image_shape(name, shape)
    pretrained = _pretrained(name, argument)
    model = _torchvision(name, classes)
    first = model.get_submodule("features.0.0")
    assert isinstance(first, nn.Conv2d)
    if channels != 3:
        _put(
            model,
            "features.0.0",
            nn.Conv2d(channels, first.out_channels, 3, stride=2, padding=1, bias=False),
        )
    if max(height, width) <= SMALL:
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        for strided in [one for one in convolutions if one.stride == (2, 2)][:2]:
            strided.stride = (1, 1)
    return load_pretrained(model, name) if pretrained else model


def _torchvision(name: str, classes: int) -> nn.Module:
    model: nn.Module = getattr(import_torchvision(name), name)(num_classes=classes)
    return model


def _pretrained(name: str, argument: str | None) -> bool:
    return one_of(name, argument, [PRETRAINED]) is not None


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
