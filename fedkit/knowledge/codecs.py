"""Codecs: how logits travel. Pure functions between strategy and grid, client app and engine.

A codec turns float32 logits (M x C) into named arrays and back; it is found by its name and made from
its argument (``3`` in ``topk:3``). Its docstring states its bytes and its error bound. What it writes
has one layout for given M and C, so that a message is measured before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedkit.errors import UsageError
from fedkit.knowledge.arrays import as_record, read_array
from fedkit.registry import load, split

Logits: TypeAlias = NDArray[np.float32]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Layout: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]

# Sums that are off by less are float32's own.
ROUNDING = 1e-4


class Codec(Protocol):
    """What a codec offers; its class takes the argument (or None) and may raise ``UsageError``."""

    space: str
    """``"prob"``: it carries only rows on the probability simplex; ``"any"``: any finite rows."""

    def layout(self, rows: int, classes: int) -> Layout:
        """Type and shape of each array that stands for ``rows`` x ``classes`` logits."""
        ...

    def encode(self, logits: Logits) -> Arrays:
        """The arrays of the layout for ``logits`` (float32, M x C); ``ValueError`` if it can't."""
        ...

    def decode(self, arrays: Arrays, rows: int, classes: int) -> Logits:
        """The logits (float32, M x C) that arrays of the layout stand for.

        Raises:
            ValueError: what is in the arrays stands for no logits.
        """
        ...


class Float32:
    """float32: as they are; 4 M C bytes, exact."""

    space = "any"

    def __init__(self, argument: str | None) -> None:
        refuse_argument("float32", argument)

    def layout(self, rows: int, classes: int) -> Layout:
        """One float32 array, M x C."""
        return {"values": ("float32", (rows, classes))}

    def encode(self, logits: Logits) -> Arrays:
        """The array itself."""
        return {"values": np.asarray(logits, dtype=np.float32)}

    def decode(self, arrays: Arrays, rows: int, classes: int) -> Logits:
        """The array itself."""
        return arrays["values"]


class Float16:
    """float16: half precision; 2 M C bytes, error at most max(2^-11 |x|, 2^-25) for |x| <= 65504."""

    space = "any"

    def __init__(self, argument: str | None) -> None:
        refuse_argument("float16", argument)

    def layout(self, rows: int, classes: int) -> Layout:
        """One float16 array, M x C."""
        return {"values": ("float16", (rows, classes))}

    def encode(self, logits: Logits) -> Arrays:
        """To float16; larger values are clipped to the format's largest."""
        largest = np.finfo(np.float16).max
        return {"values": np.clip(logits, -largest, largest).astype(np.float16)}

    def decode(self, arrays: Arrays, rows: int, classes: int) -> Logits:
        """Back to float32."""
        return arrays["values"].astype(np.float32)


@lru_cache
def make_codec(spec: str) -> Codec:
    """The codec that ``spec`` names, e.g. ``topk:3``; ``UsageError`` if there is none such."""
    name, argument = split(spec)
    codec: Codec = load("codecs", name)(argument)
    return codec


def check_codec(spec: str, space: str) -> None:
    """Raise ``UsageError`` unless ``spec`` names a codec for rows in ``space`` (logit or prob)."""
    if make_codec(spec).space == "prob" and space != "prob":
        raise UsageError(
            f"The codec {spec} carries probabilities only, but raw class scores travel here: "
            "set space=prob, or use int8."
        )


def refuse_argument(name: str, argument: str | None) -> None:
    """Raise ``UsageError`` if a codec that takes no argument was given one."""
    if argument is not None:
        raise UsageError(f"The codec {name} takes no argument, not {argument!r}.")


def pack(codec: str, logits: Logits) -> ArrayRecord:
    """Logits as a record in a message."""
    encoded = make_codec(codec).encode(logits)
    return as_record({name: np.ascontiguousarray(a) for name, a in encoded.items()})


def payload_bytes(codec: str, rows: int, classes: int) -> int:
    """Bytes that ``rows`` x ``classes`` logits take in a codec."""
    layout = make_codec(codec).layout(rows, classes)
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in layout.values())


def unpack(
    codec: str,
    record: ArrayRecord,
    rows: int,
    classes: int,
    *,
    space: str = "logit",
    finite: bool = True,
) -> Logits:
    """The logits in a record of a message that came from outside (float32, ``rows`` x ``classes``).

    Args:
        codec: how they travelled.
        record: where they are.
        rows, classes: how many they must be.
        space: with ``prob`` rows must be probabilities; what a codec's rounding took off their sum is
            put back.
        finite: whether values that are not finite are refused; if not, the caller looks for them.

    Raises:
        ValueError: not what this codec writes for ``rows`` x ``classes``, not finite, or no
            probabilities; the sentence says which.
    """
    coder = make_codec(codec)
    try:
        arrays = _read(record, coder.layout(rows, classes))
        # What is not finite may overflow on its way; it is refused below.
        with np.errstate(all="ignore"):
            logits = coder.decode(arrays, rows, classes)
    except ValueError as error:
        raise ValueError(f"its logits are not in the codec {codec}: {error}") from error
    if finite and not np.isfinite(logits).all():
        raise ValueError("its logits are not all finite")
    return on_simplex(logits) if space == "prob" else logits


def on_simplex(rows: Logits) -> Logits:
    """Rows of probabilities, rescaled to sum to 1 where a codec's rounding shows (float32, M x C).

    Raises:
        ValueError: an entry is negative or above 1, or a row's sum is not 1 within a fifth (int8
            moves each of C entries by at most 1/510); rows that are not finite are passed on.
    """
    sums = rows.sum(axis=1, dtype=np.float64)
    told = np.isfinite(sums)
    good = rows[told]
    if ((good < 0) | (good > 1.001)).any() or (np.abs(sums[told] - 1) > 0.2).any():
        raise ValueError("its rows are no probabilities")
    off = told & (np.abs(sums - 1) > ROUNDING)
    if off.any():
        rows = rows.copy()
        rows[off] = (rows[off] / sums[off, None]).astype(np.float32)
    return rows


def _read(record: ArrayRecord, layout: Layout) -> Arrays:
    if set(record) != set(layout):
        raise ValueError(f"the arrays in it are not {' and '.join(layout)}")
    # Descriptions first: nothing is read that has not the size it should have.
    for name, (dtype, shape) in layout.items():
        found = record[name]
        if (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise ValueError(
                f"{name} is {found.dtype} of shape {tuple(found.shape)}, not {dtype} of shape {shape}"
            )
    return {name: read_array(name, record[name]) for name in layout}
