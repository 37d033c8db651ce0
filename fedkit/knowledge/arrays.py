"""Arrays in messages: those that came from outside are read with care."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedkit.flower_records import new_array, new_record

if TYPE_CHECKING:
    from torch import Tensor

# Magic string, version 1.0 and the length of the header: how every array that NumPy saves begins.
_BEGINNING = struct.Struct("<8sH")
_VERSION_1 = npy.magic(1, 0)
_NUMPY = "numpy.ndarray"


def as_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Named arrays as a record of a message."""
    return new_record({name: as_array(np.asarray(values)) for name, values in arrays.items()})


def from_state_dict(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A network's named tensors as a record of a message; as ``ArrayRecord(tensors)``, for less."""
    return as_record({name: one.detach().cpu().numpy() for name, one in tensors.items()})


def as_array(values: NDArray[Any]) -> Array:
    """As ``Array(values)``, to the byte; NumPy writes the description of each kind of array once."""
    if not values.flags.c_contiguous or values.dtype.hasobject:
        return Array(values)
    data = b"".join([_beginning(values.dtype, values.shape), values.data])
    return new_array(name_of(values.dtype), values.shape, _NUMPY, data)


def as_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The named arrays in a record of our own making; what came from outside is for ``read_array``."""
    return {name: _values(array) for name, array in record.items()}


def as_state_dict(record: ArrayRecord) -> dict[str, Tensor]:
    """The named arrays in a record as tensors, as a network loads them."""
    import torch

    return {name: torch.from_numpy(_values(array)) for name, array in record.items()}


def read_array(name: str, array: Array) -> NDArray[np.generic]:
    """The values of the array ``name`` in a message; exactly what its description says.

    Raises:
        ValueError: its bytes are no such array.
    """
    try:
        values = _values(array)
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


# NumPy puts a dtype's name together each time.
name_of = lru_cache(maxsize=64)(str)


@lru_cache(maxsize=1024)
def _beginning(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What NumPy saves before the values."""
    text = BytesIO()
    npy.write_array_header_1_0(
        text, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return text.getvalue()


class _Header(NamedTuple):
    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]


@lru_cache(maxsize=1024)
def _header(text: bytes) -> _Header:
    """What a header says; to read one costs NumPy more than a small array, and clients send the same."""
    return _Header(*npy.read_array_header_1_0(BytesIO(struct.pack("<H", len(text)) + text)))


def _values(array: Array) -> NDArray[Any]:
    """As ``Array.numpy``, which raises all that this does."""
    if array.stype != _NUMPY or len(array.data) < _BEGINNING.size:
        return array.numpy()
    version, length = _BEGINNING.unpack_from(array.data)
    if version != _VERSION_1:
        return array.numpy()
    start = _BEGINNING.size + length
    header = _header(array.data[_BEGINNING.size : start])
    size = header.dtype.itemsize * math.prod(header.shape)
    if header.dtype.hasobject or header.by_columns or len(array.data) - start < size:
        return array.numpy()
    values = np.frombuffer(array.data, header.dtype, math.prod(header.shape), start)
    return values.reshape(header.shape).copy()
