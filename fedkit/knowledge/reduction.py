"""Weighted means, folded in client order in float64 and cast last (algorithms.md 0.3.2).

In float32 the mean of N identical arrays is not that array; so it is here, to the bit. Every strategy
averages through this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]


class NothingToAverage(ValueError):
    """Nobody's arrays came, or all with weight 0."""


class WeightedMean:
    """sum_k a_k w_k / sum_k a_k for each named array, in the arrays' own dtypes; one client at a time.

    Integer arrays (a normalisation layer's batch counter) take the maximum: their mean has no meaning.
    Only one sum is held, whatever the number of clients.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}
        self._total = 0.0

    def add(self, weight: float, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Take in one client's arrays with their weight a_k >= 0; weight 0 leaves them out.

        Raises:
            ValueError: names or shapes are others than those of the client before.
        """
        if weight == 0:
            return
        if not self._sums:
            self._dtypes = {name: array.dtype for name, array in arrays.items()}
            self._sums = {name: _start(array) for name, array in arrays.items()}
        elif arrays.keys() != self._sums.keys():
            raise ValueError("the arrays have different names")
        for name, array in arrays.items():
            if array.shape != self._sums[name].shape:
                raise ValueError(
                    f"{name} has the shape {array.shape}, not {self._sums[name].shape}"
                )
        self._total += weight
        for name, array in arrays.items():
            total = self._sums[name]
            if is_integer(self._dtypes[name]):
                np.maximum(total, array, out=total)
            else:
                # In place, also for what has no dimensions.
                np.add(total, np.multiply(array, weight, dtype=np.float64), out=total)

    def result(self) -> Arrays:
        """The mean.

        Raises:
            NothingToAverage: nobody's arrays came, or all with weight 0.
        """
        if self._total == 0:
            raise NothingToAverage("there is nothing to average")
        return {
            name: array
            if is_integer(self._dtypes[name])
            else np.asarray(array / self._total).astype(self._dtypes[name])
            for name, array in self._sums.items()
        }


def weighted_mean(pairs: Iterable[tuple[float, Mapping[str, NDArray[np.generic]]]]) -> Arrays:
    """The ``WeightedMean`` of pairs of weight a_k and named arrays w_k of equal shapes."""
    mean = WeightedMean()
    for weight, arrays in pairs:
        mean.add(weight, arrays)
    return mean.result()


@lru_cache(maxsize=64)
def is_integer(dtype: np.dtype[np.generic]) -> bool:
    """Whether arrays of that dtype count something, and have no mean."""
    return np.issubdtype(dtype, np.integer)


def _start(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array.copy() if is_integer(array.dtype) else np.zeros(array.shape, dtype=np.float64)
