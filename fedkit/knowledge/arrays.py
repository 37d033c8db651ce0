"""Arrays in messages: those that came from outside are read with care."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray


def as_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Named arrays as a record of a message."""
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def as_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The named arrays in a record of our own making; what came from outside is for ``read_array``."""
    return {name: array.numpy() for name, array in record.items()}


def read_array(name: str, array: Array) -> NDArray[np.generic]:
    """The values of the array ``name`` in a message; exactly what its description says.

    Raises:
        ValueError: its bytes are no such array.
    """
    try:
        values = array.numpy()
        described = np.dtype(array.dtype)
    except Exception as error:  # NumPy answers foreign bytes with many kinds of error
        raise ValueError(f"{name} can't be read: {error}") from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} can't be read: it is an archive")
    if values.shape != tuple(array.shape) or values.dtype != described:
        raise ValueError(
            f"{name} is {values.dtype} {values.shape}, but was described as "
            f"{array.dtype} {tuple(array.shape)}"
        )
    return values
