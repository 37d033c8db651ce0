"""Labelled images as tensors: decoded once, kept as bytes, normalised on the device that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Some images of one data set.

    Attributes:
        images: uint8, n x channels x height x width.
        labels: int64, n.
        mean, std: float32, one a channel, in the images' own unit.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64), in that order."""
        indices = indices.to(self.images.device)
        return Samples(self.images[indices], self.labels[indices], self.mean, self.std)

    def to(self, device: torch.device) -> Samples:
        """The same samples on another device."""
        return Samples(
            self.images.to(device),
            self.labels.to(device),
            self.mean.to(device),
            self.std.to(device),
        )

    def inputs(self, where: Tensor | slice) -> Tensor:
        """What a network reads: normalised float32 images."""
        scale = self.std.view(1, -1, 1, 1)
        return (self.images[where].float() - self.mean.view(1, -1, 1, 1)) / scale


@dataclass(frozen=True)
class DataSet:
    """A data set by name: its training pool, its common test set and the names of its classes."""

    name: str
    train: Samples
    test: Samples
    classes: tuple[str, ...]
