"""How an update travels: what local training changed, w_k - w, in fewer bytes. Pure functions.

An update is a list of float32 tensors, a network's parameters in the order of its state dict; what else is
in that, running statistics and counters, is never compressed. A codec turns an update into a few flat
arrays, whatever the number of tensors (each array costs a message a header of 128 bytes), and back. What
comes from outside is checked before it is read: a codec tells the length of each array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedkit.errors import UsageError
from fedkit.knowledge.arrays import read_array
from fedkit.knowledge.codecs import Codec, Float16
from fedkit.knowledge.quantised import Int8

Update: TypeAlias = list[NDArray[np.float32]]
Shapes: TypeAlias = Sequence[tuple[int, ...]]
Named: TypeAlias = Mapping[str, NDArray[Any]]


class Encoded(NamedTuple):
    """An update as it travels.

    Attributes:
        arrays: by name, each with one axis.
        rest: the part that does not travel and is to be added to the next update; None where what a
            codec takes away is let go.
    """

    arrays: Named
    rest: Update | None


class UpdateCodec(Protocol):
    """What a codec of updates offers."""

    def most_bytes(self, shapes: Shapes) -> int:
        """Bytes that an update of these shapes takes at most."""
        ...

    def encode(self, update: Update) -> Encoded:
        """The arrays for an update."""
        ...

    def decode(self, record: Mapping[str, Array], shapes: Shapes) -> Update:
        """The update that arrays from outside stand for.

        Raises:
            ValueError: they stand for none of these shapes, or for one that is not finite.
        """
        ...


class Rowwise:
    """``float16`` and ``int8``: the codec of that name for logits, on each tensor as a matrix.

    A row is what leads to one output (the first axis); a vector is one row. float16 takes 2 bytes a
    parameter, error at most max(2^-11 |x|, 2^-25); int8 takes 1, and 8 a row, error at most
    (max - min) / 510 of the row.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def most_bytes(self, shapes: Shapes) -> int:
        """Exactly so many."""
        lengths = self._lengths(shapes)
        return sum(np.dtype(kind).itemsize * sum(each) for kind, each in lengths.values())

    def encode(self, update: Update) -> Encoded:
        """The arrays of all tensors, one after the other; nothing is left for later."""
        with np.errstate(invalid="ignore"):  # what is not finite is refused where it arrives
            parts = [self._codec.encode(_matrix(tensor)) for tensor in update if tensor.size]
        joined = {
            name: np.concatenate([np.empty(0, kind), *(part[name].ravel() for part in parts)])
            for name, kind in self._names().items()
        }
        return Encoded(joined, None)

    def decode(self, record: Mapping[str, Array], shapes: Shapes) -> Update:
        """The tensors again."""
        lengths = self._lengths(shapes)
        arrays = read_vectors(
            record, {name: (kind, sum(each), sum(each)) for name, (kind, each) in lengths.items()}
        )
        pieces = {name: split_at(arrays[name], each) for name, (_, each) in lengths.items()}
        update, at = [], 0
        for shape in shapes:
            if math.prod(shape) == 0:
                update.append(np.zeros(shape, dtype=np.float32))
                continue
            layout = self._codec.layout(*_rows(shape))
            part = {name: pieces[name][at].reshape(size) for name, (_, size) in layout.items()}
            update.append(self._codec.decode(part, *_rows(shape)).reshape(shape))
            at += 1
        return update

    def _lengths(self, shapes: Shapes) -> dict[str, tuple[str, list[int]]]:
        """Of each array the type, and how long its part for each tensor is that has entries."""
        layouts = [self._codec.layout(*_rows(shape)) for shape in shapes if math.prod(shape)]
        return {
            name: (kind, [math.prod(layout[name][1]) for layout in layouts])
            for name, kind in self._names().items()
        }

    def _names(self) -> dict[str, str]:
        return {name: kind for name, (kind, _) in self._codec.layout(1, 1).items()}


def make_update_codec(spec: str) -> UpdateCodec | None:
    """The codec that ``spec`` names, as in ``topk:0.1``; None for ``float32``: weights travel as they are.

    Raises:
        UsageError: there is none such, or its argument makes no sense.
    """
    from fedkit.knowledge.sparse import TopK  # it is made of what is here

    name, colon, argument = spec.partition(":")
    makers: dict[str, Callable[[], UpdateCodec | None]] = {
        "float32": lambda: None,
        "float16": lambda: Rowwise(Float16(None)),
        "int8": lambda: Rowwise(Int8(None)),
    }
    if name == "topk":
        return TopK(argument)
    if name not in makers or colon:
        raise UsageError(
            f"update-codec must be float32, float16, int8 or topk:SHARE, as in topk:0.1, not {spec!r}."
        )
    return makers[name]()


def compressed(record: Mapping[str, Array], parameters: Collection[str]) -> list[str]:
    """Of the tensors in a message those that a codec takes: parameters in float32."""
    return [
        name for name, array in record.items() if name in parameters and array.dtype == "float32"
    ]


def sent_bytes(codec: str, record: Mapping[str, Array], parameters: Collection[str]) -> int:
    """Bytes, at most, in which a model like that in a message travels, its parameters in a codec."""
    maker, taken = make_update_codec(codec), set(compressed(record, parameters))
    sizes = {
        name: math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for name, array in record.items()
    }
    if maker is None:
        return sum(sizes.values())
    others = sum(size for name, size in sizes.items() if name not in taken)
    return others + maker.most_bytes(
        [tuple(record[name].shape) for name in record if name in taken]
    )


def read_vectors(
    record: Mapping[str, Array], wanted: Mapping[str, tuple[str, int, int]]
) -> dict[str, NDArray[Any]]:
    """The arrays of a message: by name type, least and greatest length (one axis), seen before reading.

    Raises:
        ValueError: others are there, or one is not as wanted or not finite.
    """
    if set(record) != set(wanted):
        raise ValueError(f"the arrays in it are not {' and '.join(wanted)}")
    for name, (kind, least, most) in wanted.items():
        found, shape = record[name], tuple(record[name].shape)
        if found.dtype != kind or len(shape) != 1 or not least <= shape[0] <= most:
            length = str(least) if least == most else f"{least} to {most}"
            raise ValueError(f"{name} is {found.dtype} {shape}, not {kind} of length {length}")
    arrays = {name: read_array(name, record[name]) for name in wanted}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
    return arrays


def split_at(flat: NDArray[Any], lengths: Iterable[int]) -> list[NDArray[Any]]:
    """The consecutive parts of an array that have these lengths."""
    ends = np.cumsum([0, *lengths])
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and columns a tensor has as a matrix."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


def _matrix(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    return tensor.reshape(_rows(tensor.shape))
