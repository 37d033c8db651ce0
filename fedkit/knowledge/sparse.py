"""Top-k: of an update the largest entries travel, with their positions; the others wait.

Sparsification with error accumulation (Aji & Heafield 2017, arXiv 1704.05021; Lin et al. 2018,
arXiv 1712.01887): of each tensor the share s of entries with the largest |x| is sent, the rest is added
to the next update. Positions are run-length coded: the gaps between neighbours as LEB128 integers,
7 bits a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedkit.errors import UsageError
from fedkit.knowledge.updates import Encoded, Shapes, Update, read_vectors, split_at

# Of a number below 2^35: more positions than any network has.
LONGEST = 5


class TopK:
    """``topk:SHARE``: of each tensor that share of its entries, one at least; 5 to 6 bytes each.

    Values are exact and the rest is kept for later, so sent + rest = update to the bit. Of K entries
    among P the values take 4 K bytes and the gaps K to K + (P - K) / 128.
    """

    def __init__(self, argument: str | None) -> None:
        try:
            self.share = float(argument or "")
        except ValueError:
            self.share = math.nan
        if not 0 < self.share <= 1:
            raise UsageError(
                "The update codec topk takes the share of entries to send, above 0 and at most 1, as "
                f"in topk:0.1, not {argument!r}."
            )

    def most_bytes(self, shapes: Shapes) -> int:
        """4 K for the values, K + (P - K) / 128 for the gaps: a byte more takes a gap of 128."""
        count, of = sum(self._counts(shapes)), sum(map(math.prod, shapes))
        return 4 * count + _longest_gaps(count, of)

    def encode(self, update: Update) -> Encoded:
        """The largest entries and where they are; the rest is left."""
        shapes = [tensor.shape for tensor in update]
        flat = np.concatenate([tensor.ravel() for tensor in update])
        starts = np.cumsum([0, *map(math.prod, shapes)])
        positions = np.concatenate(
            [
                start + largest(tensor.ravel(), count)
                for tensor, count, start in zip(update, self._counts(shapes), starts, strict=False)
            ]
        )
        arrays = {
            "values": flat[positions],
            "gaps": encode_numbers(np.diff(positions, prepend=-1) - 1),
        }
        flat[positions] = 0
        return Encoded(arrays, _shaped(flat, shapes))

    def decode(self, record: Mapping[str, Array], shapes: Shapes) -> Update:
        """The entries in their places, zero everywhere else."""
        sizes, counts = [math.prod(shape) for shape in shapes], self._counts(shapes)
        count, of = sum(counts), sum(sizes)
        arrays = read_vectors(
            record,
            {
                "values": ("float32", count, count),
                "gaps": ("uint8", count, _longest_gaps(count, of)),
            },
        )
        gaps = decode_numbers(arrays["gaps"], count)
        if (gaps >= of).any():
            raise ValueError(f"gaps lead beyond its {of} entries")
        positions = np.cumsum(gaps + 1) - 1
        within = np.diff(np.searchsorted(positions, np.cumsum([0, *sizes])))
        if (within != counts).any():
            raise ValueError("gaps do not lead to the right number of entries in each tensor")
        flat = np.zeros(of, dtype=np.float32)
        flat[positions] = arrays["values"]
        return _shaped(flat, shapes)

    def _counts(self, shapes: Shapes) -> list[int]:
        """How many entries of each tensor travel."""
        sizes = (math.prod(shape) for shape in shapes)
        return [min(size, max(1, round(self.share * size))) for size in sizes]


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the ``count`` entries of largest |x| are, in order; of equal ones the first count."""
    if count == len(values):
        return np.arange(count)
    # What is not a number counts as the largest: it is sent, refused, and does not stay.
    size = np.nan_to_num(np.abs(values), nan=np.inf, posinf=np.inf)
    threshold = np.partition(size, len(size) - count)[len(size) - count]
    above = np.flatnonzero(size > threshold)
    level = np.flatnonzero(size == threshold)[: count - len(above)]
    return np.sort(np.concatenate((above, level)))


def encode_numbers(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Whole numbers from 0 to 2^35 - 1 as LEB128: 7 bits a byte, the low ones first."""
    bits = 7 * np.arange(1, LONGEST)
    lengths = 1 + (numbers[:, None] >= 1 << bits).sum(axis=1)
    starts = np.cumsum(lengths) - lengths
    coded = np.zeros(lengths.sum(), dtype=np.uint8)
    for at in range(int(lengths.max(initial=0))):
        here = lengths > at
        more = np.where(lengths[here] > at + 1, 128, 0)
        coded[starts[here] + at] = (numbers[here] >> 7 * at) & 127 | more
    return coded


def decode_numbers(coded: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """The ``count`` numbers that LEB128 bytes from outside stand for.

    Raises:
        ValueError: they stand for more or fewer, or one takes more than 5 bytes.
    """
    ends = np.flatnonzero(coded < 128)
    if len(ends) != count or (count and ends[-1] != len(coded) - 1) or (not count and len(coded)):
        raise ValueError(f"gaps are not {count} numbers")
    starts = np.concatenate(([0], ends[:-1] + 1))[:count]
    lengths = ends - starts + 1
    if (lengths > LONGEST).any():
        raise ValueError("gaps hold a number of too many bytes")
    numbers = np.zeros(count, dtype=np.int64)
    for at in range(int(lengths.max(initial=0))):
        here = lengths > at
        numbers[here] |= (coded[starts[here] + at] & 127).astype(np.int64) << 7 * at
    return numbers


def _longest_gaps(count: int, of: int) -> int:
    return count + (of - count) // 128


def _shaped(flat: NDArray[np.float32], shapes: Shapes) -> Update:
    parts = split_at(flat, map(math.prod, shapes))
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
