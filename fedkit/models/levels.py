"""The levels of a run: widths at which clients train parts of one global network (HeteroFL).

The global network is the model at the run's widest level. A narrower level keeps of it what the model at
that width has; the widths of levels are always those of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from fedkit.data.samples import Shape
from fedkit.errors import UsageError
from fedkit.knowledge.held import Indices, open_mesh, positions
from fedkit.knowledge.reduction import Arrays
from fedkit.models.slicing import slicing_of


class Levels:
    """What each width keeps of a network that has the widest of them.

    Attributes:
        slicing: of the whole model.
        widest: the width of the network that is sliced, in (0, 1].
    """

    def __init__(self, spec: str, shape: Shape, outputs: int, widest: float) -> None:
        """The levels of the model ``spec`` up to a width; raises as ``Slicing`` does."""
        self.slicing = slicing_of(spec, tuple(shape), outputs)
        self.widest = widest
        self._sizes = {
            name: tuple(tensor.shape)
            for name, tensor in self.slicing.network(1.0).state_dict().items()
        }
        self.indices = cache(self._indices)

    def take(self, arrays: Mapping[str, NDArray[np.generic]], width: float) -> Arrays:
        """What ``width`` keeps of the widest level's arrays, as contiguous copies."""
        kept = self.indices(width)
        return {
            name: np.array(array[open_mesh(kept[name], array.shape)], order="C")
            for name, array in arrays.items()
        }

    def _indices(self, width: float) -> Mapping[str, Indices]:
        """Which rows of the widest level's tensors ``width`` keeps."""
        narrow = self.slicing.indices(width)
        if self.widest == 1:
            return narrow
        wide = self.slicing.indices(self.widest)
        return {
            name: tuple(
                np.searchsorted(positions(outer, size), positions(inner, size))
                for inner, outer, size in zip(narrow[name], wide[name], sizes, strict=True)
            )
            for name, sizes in self._sizes.items()
        }


@lru_cache(maxsize=8)
def levels_of(spec: str, shape: Shape, outputs: int, widest: float) -> Levels:
    """``Levels``, which take some time to find out, kept for the next who asks."""
    return Levels(spec, shape, outputs, widest)


def read_levels(text: str) -> tuple[float, ...]:
    """The widths in ``1,0.5,0.25``, the widest first.

    Raises:
        UsageError: they are none, or one comes twice.
    """
    try:
        # No finer than they are written in names.
        widths = sorted((float(label(float(word))) for word in text.split(",")), reverse=True)
    except ValueError:
        widths = []
    if not widths or not all(0 < width <= 1 for width in widths) or len(set(widths)) < len(widths):
        raise UsageError(
            "levels takes different widths above 0 and up to 1 with commas between, as in 1,0.5,0.25, "
            f"not {text!r}."
        )
    return tuple(widths)


def label(width: float) -> str:
    """How a width is written in names of files, records and measurements."""
    return f"{width:g}"
