"""Samples as tensors: decoded once, kept as they are stored, normalised on the device that reads them.

A ``Pool`` knows the labels of all samples and decodes those that are taken; what is taken is ``Samples``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

# Channels, height and width of an image; the number of features; the length of a sequence.
Shape: TypeAlias = tuple[int, ...]
# Inputs -> inputs of the same shape, changed at random by torch's global CPU generator, maybe in place.
Augment: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """Some decoded samples of one data set.

    Attributes:
        data: images (uint8, n x channels x height x width), features (float32, n x d) or sequences of
            tokens (uint8, n x length).
        labels: int64, n.
        mean, std: float32, one a channel or feature, in the data's own unit; empty for tokens.
        augment: what training does to a batch of inputs, if anything.
    """

    data: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> Shape:
        """Of one sample."""
        return tuple(self.data.shape[1:])

    def take(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64), in that order."""
        indices = indices.to(self.data.device)
        return replace(self, data=self.data[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> Samples:
        """The same samples on another device."""
        return Samples(
            self.data.to(device),
            self.labels.to(device),
            self.mean.to(device),
            self.std.to(device),
            self.augment,
        )

    def inputs(self, where: Tensor | slice) -> Tensor:
        """What a network reads: normalised float32, or int64 tokens."""
        # Several times as fast as advanced indexing, and with one pass over memory less.
        chosen = self.data[where] if isinstance(where, slice) else self.data.index_select(0, where)
        if not len(self.mean):
            return chosen.long()
        over = (1, -1) + (1,) * (chosen.dim() - 2)
        return (chosen.float() - self.mean.view(over)).div_(self.std.view(over))

    def training_inputs(self, where: Tensor | slice) -> Tensor:
        """What a network reads while it trains: ``inputs``, augmented where that is wanted."""
        inputs = self.inputs(where)
        return inputs if self.augment is None else self.augment(inputs)


@dataclass(frozen=True)
class Pool:
    """Samples whose labels are known, and which are decoded when they are taken.

    Attributes:
        labels: int64, n.
        read: ``indices (int64) -> data`` of these samples, as ``Samples`` holds it.
        shape: of one sample.
        mean, std: as in ``Samples``.
        owners: who spoke, wrote or measured each sample (int64, n), where the data set knows.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    shape: Shape
    mean: Tensor
    std: Tensor
    owners: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64), in that order.

        Raises:
            FedkitError: a file is damaged.
        """
        return Samples(self.read(indices), self.labels[indices], self.mean, self.std)

    def all(self) -> Samples:
        """All of it."""
        return self.take(torch.arange(len(self)))


def pool_of(data: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> Pool:
    """A pool of samples that are in memory already."""
    return Pool(labels, lambda indices: data[indices], tuple(data.shape[1:]), mean, std)


@dataclass(frozen=True)
class Form:
    """How samples must look to fit networks that are there already.

    Attributes:
        shape: of one sample.
        columns: the features' names, where they have any.
        tokens: whether they are sequences of tokens, which nothing normalises; else numbers.
    """

    shape: Shape
    columns: tuple[str, ...] = ()
    tokens: bool = False


@dataclass(frozen=True)
class DataSet:
    """A data set by name.

    Attributes:
        name: as it was asked for, with its argument.
        train, test: its training pool and its common test set (which may be empty).
        classes: the classes' names, as the labels count them; empty if it has no labels.
        columns: the features' names, where they have any.
    """

    name: str
    train: Pool
    test: Pool
    classes: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """How its samples look."""
        return Form(self.train.shape, self.columns, not len(self.train.mean))
