"""The MNIST family: images and labels in idx files, in torchvision's folders.

The files are mapped into memory, so a client reads the labels of the set and its own images. An idx
file is a big-endian header (0x0800 + the number of dimensions, then their lengths) and bytes.
"""

from __future__ import annotations

import gzip
import math
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

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

SIDE = 28


@dataclass(frozen=True)
class Family:
    """One set of four idx files.

    Attributes:
        kind: torchvision's class, which is also the folder's name.
        files: training images and labels, test images and labels.
        md5: of these files unpacked, and packed as published (``.gz``); none where only an archive of
            them has one.
        mean, std: of the training pixels from 0 to 1.
        classes: as torchvision names them.
        first_label: what the files call the first class.
        upright: whether rows are rows; EMNIST stores columns.
        call: what torchvision's class needs besides the folder.
    """

    kind: str
    files: tuple[str, ...]
    md5: tuple[tuple[str, str], ...]
    mean: float
    std: float
    classes: tuple[str, ...]
    first_label: int = 0
    upright: bool = True
    call: str = ""


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The md5 of the .gz files are torchvision's (torchvision/datasets/mnist.py); the others follow from them.
MNIST = Family(
    "MNIST",
    FILES,
    (
        ("6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432"),
        ("2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3"),
        ("27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    mean=0.1307,
    std=0.3081,
    classes=tuple(f"{digit} - {word}" for digit, word in enumerate(WORDS)),
)
FASHION = Family(
    "FashionMNIST",
    FILES,
    (
        ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("9018921c3c673c538a1fc5bad174d6f9", "25c81989df183df01b3e8a0aad5dffbe"),
        ("8181f5470baa50b63fa0f6fddb340f0a", "bef4ecab320f06d8554ea6380940ec79"),
        ("15d484375f8d13e6eb1aabb0c3f46965", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    mean=0.2860,
    std=0.3530,
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)
# Small letters that look like their capitals count as these (Cohen et al. 2017, section II).
MERGED = "cijklmopsuvwxyz"


def _emnist(
    part: str, mean: float, std: float, classes: tuple[str, ...], first_label: int
) -> Family:
    files = tuple(
        f"emnist-{part}-{half}-{what}-ubyte"
        for half in ("train", "test")
        for what in ("images-idx3", "labels-idx1")
    )
    call = f", split='{part}'"
    return Family("EMNIST", files, (), mean, std, classes, first_label, upright=False, call=call)


EMNIST = {
    "balanced": _emnist(
        "balanced",
        0.1751,
        0.3332,
        tuple(sorted(set(string.digits + string.ascii_letters) - set(MERGED))),
        first_label=0,
    ),
    "letters": _emnist("letters", 0.1722, 0.3309, tuple(string.ascii_lowercase), first_label=1),
}


def mnist(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes."""
    refuse_argument("mnist", argument)
    return _read("mnist", MNIST, sources)


def fashion_mnist(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28x28 grey, 10 classes."""
    refuse_argument("fashion-mnist", argument)
    return _read("fashion-mnist", FASHION, sources)


def emnist(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """EMNIST, handwritten, 28x28 grey: emnist:balanced (47 classes) or emnist:letters (26).

    Its files hold the images transposed; they are put upright here, as MNIST's are. Only the archive's
    md5 is published, so the files themselves can't be compared with one.
    """
    if argument not in EMNIST:
        raise UsageError(
            f"EMNIST is emnist:{' or emnist:'.join(EMNIST)}, not emnist"
            f"{'' if argument is None else f':{argument}'}."
        )
    return _read(f"emnist:{argument}", EMNIST[argument], sources)


def _read(name: str, family: Family, sources: DataSettings) -> Found:
    root = data_root(family.kind, sources)
    folder = root / family.kind / "raw"
    how = by_torchvision(family.kind, root, family.call)
    found, right = [], 0
    for number, file in enumerate(family.files):
        md5 = family.md5[number] if family.md5 else None
        path, content, published = _open(folder / file, family.kind, how, md5, sources)
        right += published
        found.append((path, _array(path, content, 1 if number % 2 else 3)))
    train_images, train_labels, test_images, test_labels = found
    told = checksums(right, len(found)) if family.md5 else "only the archive's is published"
    return Found(
        name,
        _pool(family, *train_images, *train_labels),
        _pool(family, *test_images, *test_labels),
        family.classes,
        files=tuple(path for path, _ in found),
        checksums=told,
    )


def _open(
    path: Path, kind: str, how: str, md5: tuple[str, str] | None, sources: DataSettings
) -> tuple[Path, NDArray[np.uint8], bool]:
    """The file or its .gz, its bytes unpacked, and whether it is the published one."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        content = map_file(path)
        published = md5 is not None and verify(path, content, md5[0], sources)
        return path, np.frombuffer(content, dtype=np.uint8), published
    if not packed.is_file():
        raise missing(kind, path, how)
    content = map_file(packed)
    published = md5 is not None and verify(packed, content, md5[1], sources)
    try:
        unpacked = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise FedkitError(f"{packed} is damaged ({error}); {how}.") from error
    return packed, np.frombuffer(unpacked, dtype=np.uint8), published


def _array(path: Path, content: NDArray[np.uint8], dimensions: int) -> NDArray[np.uint8]:
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4].tolist() != [0, 0, 8, dimensions]:
        raise FedkitError(f"{path} is no idx file of {dimensions} dimensions: get the original.")
    lengths = [int(length) for length in content[4:header].view(">u4")]
    if len(content) != header + math.prod(lengths):
        raise FedkitError(
            f"{path} is damaged: it has {len(content):,} bytes and should have "
            f"{header + math.prod(lengths):,}."
        )
    if dimensions == 3 and lengths[1:] != [SIDE, SIDE]:
        raise FedkitError(f"{path} holds images of {lengths[1]}x{lengths[2]}, not {SIDE}x{SIDE}.")
    return content[header:].reshape(lengths)


def _pool(
    family: Family,
    images_file: Path,
    images: NDArray[np.uint8],
    labels_file: Path,
    stored: NDArray[np.uint8],
) -> Pool:
    if len(images) != len(stored):
        raise FedkitError(
            f"{labels_file} has {len(stored):,} labels for the {len(images):,} images of {images_file}."
        )
    labels = torch.from_numpy(stored.astype(np.int64)) - family.first_label
    last = len(family.classes) - 1
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
        raise FedkitError(
            f"{labels_file} has labels from {int(stored.min())} to {int(stored.max())}; "
            f"{family.first_label} to {last + family.first_label} were expected."
        )

    def read(indices: Tensor) -> Tensor:
        chosen = torch.from_numpy(images[indices.numpy()]).unsqueeze(1)
        return chosen if family.upright else chosen.mT.contiguous()

    mean, std = torch.tensor([family.mean]) * 255, torch.tensor([family.std]) * 255
    return Pool(labels, read, (1, SIDE, SIDE), mean, std)
