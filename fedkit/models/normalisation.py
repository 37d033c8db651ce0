"""A network's normalisation layers: which tensors are theirs, and statistics that no training tracks.

Layers are known by their type. Running statistics are batch normalisation's: the others have none, or, as
instance normalisation may, such that nobody here gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedkit.data.samples import Samples
from fedkit.models.exits import MultiExit

_LAYERS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def statistics_of(model: nn.Module) -> frozenset[str]:
    """Names, in the state dict, of running means, variances and batch counters."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, _BatchNorm)
        for name, _ in layer.named_buffers(recurse=False)
    )


def normalisation_of(model: nn.Module) -> frozenset[str]:
    """Names, in the state dict, of all that normalisation layers have: scales, shifts, statistics."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, _LAYERS)
        for name in layer.state_dict()
    )


def tracks(model: nn.Module) -> bool:
    """Whether training moves running statistics of batch normalisation."""
    layers = (layer for layer in model.modules() if isinstance(layer, _BatchNorm))
    return any(layer.track_running_stats for layer in layers)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Within it, training leaves running statistics as they are; batches are normalised by their own."""
    tracking = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@torch.inference_mode()
def batch_moments(
    model: nn.Module, samples: Samples, batch_size: int
) -> tuple[dict[str, Tensor], int]:
    """The mean over batches of what batch normalisation layers see: static statistics, over some samples.

    Only these layers are as in training, so each batch is normalised by its own moments; dropout, and
    whatever else differs in training, is off, but for exits: all are run. The samples are not augmented. As
    in training, a last batch of one sample is left out.

    Args:
        model: whose running statistics are overwritten.
        samples: n samples.
        batch_size: samples a batch.

    Returns:
        By name in the state dict the means and unbiased variances (float32, one number a channel), and
        over how many batches they are; with no batch they mean nothing.
    """
    model.eval()
    # In evaluation a network with several exits leaves by the last one.
    run = model.every_exit if isinstance(model, MultiExit) else model
    layers = {
        path: layer
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, _BatchNorm)
    }
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # torch then takes the mean over all batches
        layer.train()
    starts = range(0, len(samples) - 1, batch_size)
    for at in starts:
        run(samples.inputs(slice(at, at + batch_size)))
    return {
        f"{path}.{name}" if path else name: tensor
        for path, layer in layers.items()
        for name in ("running_mean", "running_var")
        if isinstance(tensor := getattr(layer, name), Tensor)
    }, len(starts)
