"""CIFAR-10 and CIFAR-100: batches of images in Python pickles, in torchvision's folders.

A pickle may run code when it is read. These are read by an unpickler that knows the few names that
such files contain, and makes inert records of them. The images stay where they are in the file, mapped
into memory: a client reads the labels of the set and its own images.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkit.data.found import Found, refuse_argument
from fedkit.data.places import data_root
from fedkit.data.published import by_torchvision, checksums, map_file, missing, verify
from fedkit.data.samples import Form, Pool
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RISK = " (it is a pickle)"


@dataclass(frozen=True)
class Family:
    """One of the two sets.

    Attributes:
        kind: torchvision's class.
        folder: under the data root.
        train, test, meta: files and their md5 (torchvision/datasets/cifar.py).
        mean, std: of the training pixels from 0 to 1, each channel.
    """

    kind: str
    folder: str
    train: tuple[tuple[str, str], ...]
    test: tuple[str, str]
    meta: tuple[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Family(
    "CIFAR10",
    "cifar-10-batches-py",
    (
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    ("test_batch", "40351d587109b95175f43aff81a1287e"),
    ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)
CIFAR100 = Family(
    "CIFAR100",
    "cifar-100-python",
    (("train", "16019d7e3df5f24257cddd939b257f8d"),),
    ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    ("meta", "7973b15100ade9c7d40fb424638fde48"),
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
)


def cifar10(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """CIFAR-10: 50,000 + 10,000 photographs, 32x32 RGB, 10 classes."""
    refuse_argument("cifar10", argument)
    return _read("cifar10", CIFAR10, "labels", "label_names", sources)


def cifar100(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """CIFAR-100: 50,000 + 10,000 photographs, 32x32 RGB, 100 classes; cifar100:coarse: 20."""
    if argument not in (None, "coarse"):
        raise UsageError(f"CIFAR-100 is cifar100 or cifar100:coarse, not cifar100:{argument}.")
    kind = argument or "fine"
    name = "cifar100" if argument is None else f"cifar100:{argument}"
    return _read(name, CIFAR100, f"{kind}_labels", f"{kind}_label_names", sources)


def _read(name: str, family: Family, labels: str, names: str, sources: DataSettings) -> Found:
    root = data_root(family.kind, sources)
    how, right = by_torchvision(family.kind, root), 0
    wanted = [*family.train, family.test, family.meta]
    paths = [root / family.folder / file for file, _ in wanted]
    for path, (_, md5) in zip(paths, wanted, strict=True):
        if not path.is_file():
            raise missing(family.kind, path, how)
        right += verify(path, map_file(path), md5, sources, RISK)
    classes = _names(paths[-1], names)
    batches = [_batch(path, labels, len(classes)) for path in paths[:-1]]
    return Found(
        name,
        _pool(family, batches[:-1]),
        _pool(family, batches[-1:]),
        classes,
        files=tuple(paths),
        checksums=checksums(right, len(paths)),
    )


def _pool(family: Family, batches: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> Pool:
    images = [rows for rows, _ in batches]
    ends = np.cumsum([len(rows) for rows in images])

    def read(indices: Tensor) -> Tensor:
        wanted = indices.numpy()
        chosen = np.empty((len(wanted), PIXELS), dtype=np.uint8)
        in_batch = np.searchsorted(ends, wanted, side="right")
        for number, rows in enumerate(images):
            here = in_batch == number
            chosen[here] = rows[wanted[here] - (ends[number] - len(rows))]
        return torch.from_numpy(chosen.reshape(-1, *SHAPE))

    labels = torch.from_numpy(np.concatenate([of_rows for _, of_rows in batches]))
    mean, std = torch.tensor(family.mean) * 255, torch.tensor(family.std) * 255
    return Pool(labels, read, SHAPE, mean, std)


def _batch(path: Path, labels: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n x 3072) and labels of one file."""
    fields = _unpickle(path)
    data, found = fields.get("data"), fields.get(labels)
    if not isinstance(data, _Array) or not isinstance(found, list):
        raise FedkitError(f"{path} has no data and {labels}: it is no batch of this data set.")
    if not all(type(label) is int and 0 <= label < classes for label in found):
        raise FedkitError(f"{path} has labels that are not whole numbers from 0 to {classes - 1}.")
    shape = data.shape
    if shape != (len(found), PIXELS) or len(data.content) != len(found) * PIXELS:
        raise FedkitError(
            f"{path} has {len(found):,} labels, and an array of {len(data.content):,} bytes and shape "
            f"{shape} for their images; {len(found):,} x {PIXELS} was expected."
        )
    images = _where(path, data.content).reshape(shape, order="F" if data.by_columns else "C")
    return images, np.array(found, dtype=np.int64)


def _where(path: Path, content: bytes) -> NDArray[np.uint8]:
    """The place of ``content`` in the mapped file, so that the copy can be dropped."""
    mapped = map_file(path)
    # Both of the pickle's ways to write so many bytes begin with their number.
    beginning = len(content).to_bytes(4, "little") + content[:64]
    at = mapped.find(beginning)
    if at < 0:
        return np.frombuffer(content, dtype=np.uint8)
    return np.frombuffer(mapped, dtype=np.uint8, count=len(content), offset=at + 4)


def _names(path: Path, field: str) -> tuple[str, ...]:
    names = _unpickle(path).get(field)
    if isinstance(names, list):
        names = [_text(name) for name in names]
    if not isinstance(names, list) or not names or not all(type(name) is str for name in names):
        raise FedkitError(f"{path} has no {field}: it is not this data set's.")
    return tuple(names)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            fields = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # whatever bytes that are no pickle make of it
        raise FedkitError(f"{path} can't be read ({error}): get the original.") from error
    if not isinstance(fields, dict):
        raise FedkitError(f"{path} holds no fields: get the original.")
    return {_text(name): value for name, value in fields.items()}


def _text(value: Any) -> Any:
    # Python 2 wrote these files, and its strings are bytes.
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Array:
    """What a pickled NumPy array says of itself."""

    shape: tuple[int, ...] = ()
    by_columns = False
    content = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "uint8"):
            raise pickle.UnpicklingError("an array that is not of bytes")
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array without its bytes")
        self.shape, self.by_columns, self.content = tuple(shape), bool(by_columns), content


class _Kind:
    """What a pickled NumPy dtype says of itself."""

    def __init__(self, name: object, *flags: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """Byte order and padding: nothing that bytes have."""


def _array(*arguments: object) -> _Array:
    return _Array()


def _bytes(text: str, encoding: str) -> bytes:
    # Python 3's way to write bytes for Python 2.
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _KNOWN[module, name]
