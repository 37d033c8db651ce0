"""The mean over holders: clients that hold parts of a network, averaged where they hold it.

A narrow or shallow network is a part of a wide or deep one: some tensors, or the first channels of them.
Each element becomes the mean over exactly those clients that hold it, and stays where none does (HeteroFL,
Diao et al. 2021; algorithms.md 7, step 5). Folded in client order in float64 and cast last, as every mean
here: where all hold everything this is ``WeightedMean`` to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fedkit.knowledge.reduction import Arrays, is_integer

# For each dimension of a tensor which of its rows are held: sorted positions (int64), or a slice.
Indices: TypeAlias = tuple[NDArray[np.int64] | slice, ...]


class HeldMean:
    """sum_k a_k w_k / sum_k a_k over those who hold an element; the old bits where nobody does.

    Integer arrays (a normalisation layer's batch counter) take the maximum over holders.
    """

    def __init__(self, before: Mapping[str, NDArray[np.generic]]) -> None:
        """A mean of nobody's yet.

        Args:
            before: the whole network's arrays; they are not written to.
        """
        self._before = dict(before)
        self._sums: dict[str, Any] = {}
        # What the holders of a whole tensor weigh together, and for tensors that somebody holds in
        # part, the weight of those at each element.
        self._whole: dict[str, float] = dict.fromkeys(before, 0.0)
        self._parts: dict[str, NDArray[np.float64]] = {}

    def add(
        self,
        weight: float,
        arrays: Mapping[str, NDArray[np.generic]],
        indices: Mapping[str, Indices] | None = None,
    ) -> None:
        """Take in one client's arrays with their weight a_k >= 0; weight 0 leaves them out.

        Args:
            weight: a_k.
            arrays: what it holds; a tensor that is not there is not held.
            indices: where in the whole tensor an array lies; one that is not named is held whole.

        Raises:
            ValueError: there is no such tensor, or the array does not fit its place.
        """
        if weight == 0:
            return
        places = {
            name: self._place(name, array, (indices or {}).get(name))
            for name, array in arrays.items()
        }
        for name, array in arrays.items():
            if name not in self._sums:
                self._sums[name] = self._start(name)
            total, place = self._sums[name], places[name]
            if is_integer(array.dtype):
                total[place] = np.maximum(total[place], array)
            else:
                total[place] += weight * array.astype(np.float64)
            if array.shape == total.shape:
                self._whole[name] += weight
                continue
            if name not in self._parts:
                self._parts[name] = np.zeros(total.shape)
            self._parts[name][place] += weight

    def result(self) -> Arrays:
        """The mean, in the arrays' own dtypes and order."""
        return {name: self._mean(name, old) for name, old in self._before.items()}

    def _start(self, name: str) -> NDArray[np.generic]:
        old = self._before[name]
        if is_integer(old.dtype):
            # Below whatever a holder may tell.
            least: int = np.iinfo(cast(Any, old.dtype)).min
            return np.full(old.shape, least, dtype=old.dtype)
        return np.zeros(old.shape)

    def _mean(self, name: str, old: NDArray[np.generic]) -> NDArray[np.generic]:
        if name not in self._sums:
            return old
        total, held = self._sums[name], self._parts.get(name, 0.0) + self._whole[name]
        if is_integer(old.dtype):
            mean = total
        else:
            with np.errstate(invalid="ignore"):  # 0 / 0 where nobody holds it
                mean = np.asarray(total / held).astype(old.dtype)
        return mean if np.all(held) else np.where(np.asarray(held) > 0, mean, old)

    def _place(self, name: str, array: NDArray[np.generic], indices: Indices | None) -> Any:
        """What to index the whole tensor with; ``ValueError`` if the array does not fit there."""
        whole = self._before.get(name)
        if whole is None:
            raise ValueError(f"there is no tensor {name}")
        if indices is None:
            indices = (slice(None),) * whole.ndim
        if len(indices) != whole.ndim:
            raise ValueError(f"{name} has {whole.ndim} dimensions, not {len(indices)}")
        place = open_mesh(indices, whole.shape)
        shape = _extent(indices, whole.shape)
        if array.shape != shape or array.dtype != whole.dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, and its place {whole.dtype} {shape}"
            )
        return place


def pack_classes(classes: NDArray[np.int64], outputs: int) -> bytes:
    """Which of C classes somebody holds, as one bit each."""
    mask = np.zeros(outputs, dtype=np.uint8)
    mask[classes] = 1
    return np.packbits(mask).tobytes()


def unpack_classes(told: object, outputs: int) -> NDArray[np.int64]:
    """The classes (int64, in order) that ``pack_classes`` told.

    Raises:
        ValueError: it is not that.
    """
    if not isinstance(told, bytes) or len(told) != (outputs + 7) // 8:
        raise ValueError("it does not tell which classes it holds")
    bits = np.unpackbits(np.frombuffer(told, dtype=np.uint8))
    if bits[outputs:].any():
        raise ValueError(f"it holds a class beyond the {outputs} that there are")
    return np.flatnonzero(bits)


def open_mesh(indices: Indices, shape: tuple[int, ...]) -> Any:
    """What to index a tensor of that shape with, to read or write the rows held in every dimension."""
    if not shape:
        return ...
    if all(isinstance(rows, slice) for rows in indices):
        return indices
    return np.ix_(*(positions(rows, size) for rows, size in zip(indices, shape, strict=True)))


def positions(rows: NDArray[np.int64] | slice, size: int) -> NDArray[np.int64]:
    """The positions (int64) that an index set names in a dimension of that size."""
    return np.arange(size)[rows] if isinstance(rows, slice) else rows


def _extent(indices: Indices, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = zip(indices, shape, strict=True)
    return tuple(
        len(range(*rows.indices(size))) if isinstance(rows, slice) else len(rows)
        for rows, size in sizes
    )
