"""Which indices of which tensors of a network belong together.

A *node* is one index along one dimension of one tensor of the state dict. Nodes that are tied are one
channel: it stays or goes as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from fedkit.models.marks import Marks, along, pairs, thin


@dataclass(frozen=True)
class Channels:
    """The channels of a network.

    Attributes:
        numbers: for each tensor of the state dict and each of its dimensions the channel of each index.
        kinds: what a channel goes through, by its number: the dimensions of tensors that it lies on,
            how often, and what it was taken apart by. Channels of one kind can stand for each other.
        whole: whether a channel is the input's or a logit's, by its number.
        logits: tensors whose rows give the logits -> the dimension that counts them.
        decisions: what was decided on the way, in order.
    """

    numbers: Mapping[str, tuple[NDArray[np.int64], ...]]
    kinds: Sequence[tuple[object, ...]]
    whole: NDArray[np.bool_]
    logits: Mapping[str, int]
    decisions: Sequence[object]


class Nodes:
    """Nodes, what ties them, and what else is known of them."""

    def __init__(self, model: nn.Module) -> None:
        self._count = 1  # 0 is none
        self._lines: list[tuple[int, int]] = []  # first node and how many, of each dimension
        self._inputs: list[int] = []
        self._ties: list[Tensor] = []
        self._places: Marks = []
        self.tensors = model.state_dict(keep_vars=True)
        # Two names may share one tensor.
        self._marks: dict[int, Marks] = {}
        for tensor in self.tensors.values():
            if id(tensor) not in self._marks:
                axes = range(tensor.ndim)
                self._marks[id(tensor)] = [self._fresh(tensor, axis) for axis in axes]

    def input(self, batch: Tensor) -> Tensor:
        """The mark of a batch of numbers: its channels, or features."""
        mark = self._fresh(batch, axis=1)
        self._inputs += along(mark, axis=1).tolist()
        return mark

    def _fresh(self, tensor: Tensor, axis: int) -> Tensor:
        """New nodes for the indices along an axis, as a mark of the whole tensor."""
        size = tensor.shape[axis]
        self._lines.append((self._count, size))
        numbers = torch.arange(self._count, self._count + size, device="cpu")
        self._count += size
        around = [1] * tensor.ndim
        around[axis] = size
        return numbers.view(around).expand(tensor.shape)

    def of(self, tensor: Tensor) -> Marks | None:
        """The nodes of a tensor of the state dict, dimension by dimension; None if it is none."""
        return self._marks.get(id(tensor))

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Say that elements at the same place are of one channel."""
        found = pairs(one, other)
        self._ties.append(found[found[:, 0] != found[:, 1]])

    def place(self, mark: Tensor) -> None:
        """Say that the channels of these nodes, and no others, go through one place."""
        self._places.append(torch.unique(thin(mark)[0]))

    def channels(self, outputs: Marks, decisions: Sequence[object]) -> Channels:
        """Nodes that are tied, as channels; ``outputs`` mark the logits."""
        ties = torch.cat(self._ties).numpy() if self._ties else np.empty((0, 2), dtype=np.int64)
        ones = np.ones(len(ties), dtype=np.int8)
        graph = coo_array((ones, (ties[:, 0], ties[:, 1])), shape=(self._count, self._count))
        many, channel = connected_components(graph, directed=False)
        lies_on: list[dict[int, int]] = [defaultdict(int) for _ in range(many)]
        for line, (start, size) in enumerate(self._lines):
            for number in channel[start : start + size]:
                lies_on[number][line] += 1
        for place, mark in enumerate(self._places, start=len(self._lines)):
            for number in np.unique(channel[mark[mark > 0].numpy()]):
                lies_on[number][place] = 1
        ends = np.unique(
            channel[[int(node) for mark in outputs for node in torch.unique(mark) if node]]
        )
        whole = np.zeros(many, dtype=bool)
        whole[ends] = True
        whole[channel[self._inputs]] = True
        numbers = {
            name: tuple(channel[along(mark, axis).numpy()] for axis, mark in enumerate(marks))
            for name, marks in ((name, self._marks[id(one)]) for name, one in self.tensors.items())
        }
        logits = {
            name: axis
            for name, lines in numbers.items()
            for axis, line in enumerate(lines)
            if np.isin(line, ends).all()
        }
        kinds = [tuple(sorted(on.items())) for on in lies_on]
        return Channels(numbers, kinds, whole, logits, decisions)
