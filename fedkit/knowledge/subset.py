"""The public subset of a round, named by explicit indices (algorithms.md 0.3.4).

A bare seed would not do: NumPy does not promise equal streams across versions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedkit.data.partitions import Indices
from fedkit.knowledge.arrays import read_array


def draw(
    generator: np.random.Generator,
    total: int,
    count: int,
    *,
    replacement: bool = False,
    strata: NDArray[np.int64] | None = None,
) -> Indices:
    """``count`` of ``total`` public samples (all, if there are no more), sorted, int64.

    Args:
        generator: where the draw comes from.
        total: size of the public set.
        count: size of the subset, M.
        replacement: whether a sample may come twice (KT-pFL's code draws so).
        strata: public labels (int64, total): each label then keeps its share, as FedMD's code has it.
    """
    count = min(count, total)
    if strata is not None:
        shuffled = generator.permutation(total)
        by_label = shuffled[np.argsort(strata[shuffled], kind="stable")]
        # Evenly spaced picks along the sorted labels take from each label its share, to within one.
        return np.sort(by_label[(np.arange(count) * total) // count])
    return np.sort(generator.choice(total, size=count, replace=replacement))


def record(indices: Indices) -> ArrayRecord:
    """Indices as a record in a message: 4 bytes each."""
    return ArrayRecord({"indices": Array(indices.astype(np.int32))})


def read(record: ArrayRecord, total: int) -> Indices:
    """The indices in a record of a message.

    Raises:
        ValueError: not one-dimensional whole numbers below ``total``.
    """
    if "indices" not in record:
        raise ValueError("the subset is not a list of indices")
    indices = read_array("indices", record["indices"])
    if indices.ndim != 1 or indices.dtype != np.int32 or not len(indices):
        raise ValueError("the subset is not a list of indices")
    whole: Indices = indices.astype(np.int64)
    if whole.min() < 0 or whole.max() >= total:
        raise ValueError(f"the subset reaches beyond the {total} public samples")
    return whole


def digest(indices: Indices) -> str:
    """First 8 bytes (16 hex digits) of the SHA-256 of the indices; a client answers with it."""
    return hashlib.sha256(indices.astype(">i4").tobytes()).digest()[:8].hex()
