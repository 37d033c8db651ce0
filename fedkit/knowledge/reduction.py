"""Weighted means, folded in client order in float64 and cast last (algorithms.md 0.3.2).

In float32 the mean of N identical arrays is not that array; so it is here, to the bit. Every strategy
averages through this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]


class NothingToAverage(ValueError):
    """Nobody's arrays came, or all with weight 0."""


def weighted_mean(pairs: Iterable[tuple[float, Mapping[str, NDArray[np.generic]]]]) -> Arrays:
    """sum_k a_k w_k / sum_k a_k for each named array, in the arrays' own dtypes.

    Integer arrays (a normalisation layer's batch counter) take the maximum: their mean has no meaning.
    Only one sum is held, whatever the number of clients.

    Args:
        pairs: weight a_k >= 0 and named arrays w_k of equal shapes; those of weight 0 are left out.

    Raises:
        NothingToAverage: there is no pair, or all weights are 0.
        ValueError: names or shapes differ.
    """
    sums: dict[str, Any] = {}
    dtypes: dict[str, np.dtype[np.generic]] = {}
    total = 0.0
    for weight, arrays in pairs:
        if weight == 0:
            continue
        if not sums:
            dtypes = {name: array.dtype for name, array in arrays.items()}
            sums = {name: _start(array) for name, array in arrays.items()}
        elif arrays.keys() != sums.keys():
            raise ValueError("the arrays have different names")
        total += weight
        for name, array in arrays.items():
            if array.shape != sums[name].shape:
                raise ValueError(f"{name} has the shape {array.shape}, not {sums[name].shape}")
            if _is_integer(dtypes[name]):
                np.maximum(sums[name], array, out=sums[name])
            else:
                sums[name] += weight * array.astype(np.float64)
    if total == 0:
        raise NothingToAverage("there is nothing to average")
    return {
        name: array if _is_integer(dtypes[name]) else np.asarray(array / total).astype(dtypes[name])
        for name, array in sums.items()
    }


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    return np.issubdtype(dtype, np.integer)


def _start(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array.copy() if _is_integer(array.dtype) else np.zeros(array.shape, dtype=np.float64)
