"""Codecs: how logits travel. Pure functions between strategy and grid, client app and engine.

A codec turns float32 logits (M x C) into named arrays and back. Its docstring states its bytes and its
error bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedkit.knowledge.arrays import read_array
from fedkit.registry import load

Logits: TypeAlias = NDArray[np.float32]


class Codec(Protocol):
    """What a codec offers."""

    def encode(self, logits: Logits) -> dict[str, NDArray[np.generic]]:
        """Named arrays that stand for ``logits`` (float32, M x C)."""
        ...

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Logits:
        """The logits (float32, M x C); ``KeyError`` or ``ValueError`` if the arrays are no such."""
        ...


class Float32:
    """float32: as they are; 4 M C bytes, exact."""

    def encode(self, logits: Logits) -> dict[str, NDArray[np.generic]]:
        """One float32 array, M x C."""
        return {"values": np.asarray(logits, dtype=np.float32)}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Logits:
        """The array itself."""
        return _values(arrays, np.float32)


class Float16:
    """float16: half precision; 2 M C bytes, error at most max(2^-11 |x|, 2^-25) for |x| <= 65504."""

    def encode(self, logits: Logits) -> dict[str, NDArray[np.generic]]:
        """One float16 array, M x C; larger values are clipped to the format's largest."""
        largest = np.finfo(np.float16).max
        return {"values": np.clip(logits, -largest, largest).astype(np.float16)}

    def decode(self, arrays: Mapping[str, NDArray[np.generic]]) -> Logits:
        """Back to float32."""
        return _values(arrays, np.float16)


def pack(codec: str, logits: Logits) -> ArrayRecord:
    """Logits as a record in a message."""
    coder: Codec = load("codecs", codec)()
    encoded = coder.encode(logits)
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in encoded.items()})


def payload_bytes(codec: str, rows: int, classes: int) -> int:
    """Bytes that ``rows`` x ``classes`` logits take in a codec."""
    coder: Codec = load("codecs", codec)()
    encoded = coder.encode(np.zeros((rows, classes), dtype=np.float32))
    return sum(array.nbytes for array in encoded.values())


def unpack(codec: str, record: ArrayRecord, rows: int, classes: int) -> Logits:
    """The logits in a record of a message that came from outside.

    Raises:
        ValueError: not what this codec writes, not ``rows`` x ``classes``, or not finite; the
            sentence says which.
    """
    coder: Codec = load("codecs", codec)()
    try:
        logits = coder.decode({name: read_array(name, array) for name, array in record.items()})
    except (KeyError, ValueError) as error:
        raise ValueError(f"its logits are not in the codec {codec}: {error}") from error
    if logits.shape != (rows, classes):
        raise ValueError(f"its logits have the shape {logits.shape}, not {(rows, classes)}")
    if not np.isfinite(logits).all():
        raise ValueError("its logits are not all finite")
    return logits


def _values(arrays: Mapping[str, NDArray[np.generic]], dtype: type) -> Logits:
    values = arrays["values"]
    if values.dtype != dtype:
        raise ValueError(f"values of type {values.dtype} instead of {np.dtype(dtype)}")
    return values.astype(np.float32)
