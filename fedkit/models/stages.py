"""Where a network can be left: its stem, its stages, and what an exit after each of them looks like.

Three kinds are taken apart here: chains of layers (``nn.Sequential`` with nothing nested), after each
pooling and each hidden linear layer; torchvision's ResNets, and HeteroFL's pre-activated ones, after each
of four stages. Any other network tells its stages by a method ``stages() -> Stages``, as the transformer
does. Left after its last stage a network is what it always is, layer by layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import ismethod

import torch
from torch import nn

from fedkit.errors import UsageError

GRID = 4
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# ResNets are known by what they consist of beside layer1, layer2, ...: torchvision's class would have to
# be imported to be asked for.
_STEM = ("conv1", "bn1", "relu", "maxpool")
_RESNET, _PRERESNET = {*_STEM, "avgpool", "fc"}, {"conv1", "head"}


@dataclass(frozen=True)
class Stages:
    """A network in parts.

    Attributes:
        stem: what comes before the first stage.
        stages: each reads what the one before gives.
        exit: ``(features, outputs)`` makes a head for features of that shape (samples first); its
            logits are n x outputs.
    """

    stem: nn.Module
    stages: Sequence[nn.Module]
    exit: Callable[[torch.Size, int], nn.Module]


def stages_of(spec: str, network: nn.Module) -> Stages:
    """The network ``spec`` in parts, which are its own layers and no copies.

    Raises:
        UsageError: there is no place where it could be left.
    """
    layers = dict(network.named_children())
    own = getattr(network, "stages", None)
    if ismethod(own):
        parts = own()
        if isinstance(parts, Stages) and parts.stages:
            return parts
        raise UsageError(
            f"The method stages() of {spec} must give fedkit's Stages, and one at least."
        )
    blocks = {name: layer for name, layer in layers.items() if name.startswith("layer")}
    beside = layers.keys() - blocks.keys()
    if blocks and beside == _PRERESNET:
        norm = network.get_submodule("head.norm")
        return Stages(
            named(conv1=layers["conv1"]),
            list(blocks.values()),
            lambda features, outputs: _preactivated(norm, features[1], outputs),
        )
    if blocks and beside == _RESNET:
        stem = {name: layers[name] for name in _STEM}
        return Stages(named(**stem), list(blocks.values()), _pooled)
    nested = any(list(layer.children()) for layer in layers.values())
    if isinstance(network, nn.Sequential) and not nested:
        cut = _cut(layers)
        if cut:
            return Stages(named(), cut, _on_a_grid)
    raise UsageError(
        f"The model {spec} has no stages after which it could be left early: take lenet, cnn, mlp, "
        "heterofl-cnn, resnet18, preresnet18 or transformer, or give a network of your own a method "
        "stages()."
    )


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under these names."""
    return nn.Sequential(OrderedDict(layers))


def _cut(layers: dict[str, nn.Module]) -> list[nn.Module]:
    """The stages of a chain, whose layers keep their names; none if it can't be cut.

    Its last linear layer is not among them: that becomes the last exit's.
    """
    (*names, last) = layers
    if not isinstance(layers[last], nn.Linear):
        return []
    stages: list[dict[str, nn.Module]] = [{}]
    for name, following in zip(names, [*names[1:], last], strict=True):
        stages[-1][name] = layers[name]
        linear = any(isinstance(layer, nn.Linear) for layer in stages[-1].values())
        if isinstance(layers[name], _POOLS) or (
            linear and isinstance(layers[following], nn.Linear)
        ):
            stages.append({})
    # What only shapes the features for the last layer is no stage.
    if len(stages) > 1 and not _trains(stages[-1]):
        stages[-2].update(stages.pop())
    return [named(**stage) for stage in stages] if all(map(_trains, stages)) else []


def _trains(layers: dict[str, nn.Module]) -> bool:
    return any(True for layer in layers.values() for _ in layer.parameters())


def _on_a_grid(features: torch.Size, outputs: int) -> nn.Module:
    """A chain's own head reads features where they stand: its exits do, on a grid of at most 4x4.

    Averaged over all pixels the first convolution's features tell next to nothing.
    """
    if len(features) == 2:
        return named(linear=nn.Linear(features[1], outputs))
    height, width = (-(-size // GRID) for size in features[2:])
    cells = (features[2] // height) * (features[3] // width)
    return named(
        pool=nn.AvgPool2d((height, width)),
        flatten=nn.Flatten(),
        linear=nn.Linear(features[1] * cells, outputs),
    )


def _pooled(features: torch.Size, outputs: int) -> nn.Module:
    linear = nn.Linear(features[1], outputs)
    return named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=linear)


def _preactivated(norm: nn.Module, channels: int, outputs: int) -> nn.Module:
    linear = nn.Linear(channels, outputs)
    nn.init.zeros_(linear.bias)  # as HeteroFL's authors start it
    return named(
        norm=_like(norm, channels),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=linear,
    )


def _like(norm: nn.Module, channels: int) -> nn.Module:
    if isinstance(norm, nn.BatchNorm2d):
        return nn.BatchNorm2d(channels)
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, channels)
    return nn.Identity()
