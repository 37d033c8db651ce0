"""Marks: integer tensors that say of each element of another tensor where it comes from (0: nowhere).

Most marks are the same along most axes, and are kept as expanded views that take no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Marks: TypeAlias = list[Tensor]


def varies(mark: Tensor, axis: int) -> bool:
    """Whether a mark tells elements apart along an axis (0, which is none, does not)."""
    (one,) = thin(mark)
    if one.shape[axis] < 2:
        return False
    most, least = one.amax(axis), torch.where(one == 0, one.max(), one).amin(axis)
    return bool(((most > least) & (most > 0)).any())


def axes_of(mark: Tensor) -> tuple[int, ...]:
    """Along which axes a mark tells elements apart."""
    return tuple(axis for axis in range(mark.ndim) if varies(mark, axis))


def matches(ones: Marks, others: Marks) -> list[tuple[int, int]]:
    """Which marks of two operands are of the same channels: places that one tells apart, so does the other.

    Where patterns are not the same, those that lie along the same axes.
    """
    found: list[tuple[int, int]] = []

    def add(fits: Callable[[Tensor, Tensor], bool]) -> None:
        for at, one in enumerate(ones):
            for number, other in enumerate(others):
                free = at not in [a for a, _ in found] and number not in [b for _, b in found]
                if free and fits(one, other):
                    found.append((at, number))

    add(_same_pattern)
    add(lambda one, other: bool(axes_of(one)) and axes_of(one) == axes_of(other))
    return found


def _same_pattern(one: Tensor, other: Tensor) -> bool:
    if axes_of(one) != axes_of(other):
        return False
    both = pairs(one, other)
    return len(both) == len(set(both[:, 0].tolist())) == len(set(both[:, 1].tolist())) > 0


def pairs(one: Tensor, other: Tensor) -> Tensor:
    """The different pairs of marks at the same places, where both are marked (n x 2)."""
    shape = np.broadcast_shapes(one.shape, other.shape)
    one, other = thin(one.expand(shape), other.expand(shape))
    both = (one > 0) & (other > 0)
    coded = torch.unique((one[both] << 32) | other[both])
    return torch.stack([coded >> 32, coded & (2**32 - 1)], dim=1)


def first_of(one: Tensor, other: Tensor) -> Tensor:
    """The mark of ``one`` at each place, or ``other``'s where it has none."""
    shape = one.shape
    one, other = thin(one, other)
    return torch.where(one > 0, one, other).expand(shape)


def thin(*marks: Tensor) -> list[Tensor]:
    """Marks of one shape without the axes along which all are merely repeated: those have size 1."""
    thinner = list(marks)
    for axis in range(marks[0].ndim):
        if all(mark.stride(axis) == 0 for mark in marks):
            thinner = [mark.narrow(axis, 0, min(1, mark.shape[axis])) for mark in thinner]
    return thinner


def along(mark: Tensor, axis: int) -> Tensor:
    """A mark along one axis, at the beginning of all others."""
    return mark[tuple(slice(None) if at == axis else 0 for at in range(mark.ndim))]
