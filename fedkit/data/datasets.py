"""Data sets by name. ``digits`` comes with scikit-learn; the others are read through torchvision.

Nothing is downloaded: a device in the field or a cluster node may have no way out, and a data set
that changes under one's feet spoils every number. The error says how to get the files.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkit.data.samples import DataSet, Samples
from fedkit.errors import FedkitError
from fedkit.registry import load, split
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings

DIGITS_TEST = 397


def open_dataset(spec: str, sources: DataSettings) -> DataSet:
    """The data set that ``spec`` names.

    Raises:
        UsageError: there is no such data set.
        FedkitError: its files are missing or not the published ones.
    """
    name, _ = split(spec)
    loader: Callable[[DataSettings], DataSet] = load("datasets", name)
    return loader(sources)


def digits(sources: DataSettings) -> DataSet:
    """scikit-learn's 1,797 real handwritten digits, 8x8 grey, 10 classes; no download.

    The set has no official test split: 397 images are set aside, the same for every seed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(numpy_generator(0, "digits official test split").permutation(1797))
    every = Samples(images, labels, torch.tensor([4.884]), torch.tensor([6.017]))
    return DataSet(
        "digits",
        train=every.take(order[DIGITS_TEST:].sort().values),
        test=every.take(order[:DIGITS_TEST].sort().values),
        classes=tuple(str(digit) for digit in range(10)),
    )


def mnist(sources: DataSettings) -> DataSet:
    """MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes."""
    return _torchvision("mnist", "MNIST", sources, (0.1307,), (0.3081,))


def fashion_mnist(sources: DataSettings) -> DataSet:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28x28 grey, 10 classes."""
    return _torchvision("fashion-mnist", "FashionMNIST", sources, (0.2860,), (0.3530,))


def cifar10(sources: DataSettings) -> DataSet:
    """CIFAR-10: 50,000 + 10,000 photographs, 32x32 RGB, 10 classes."""
    root = _root("CIFAR10", sources)
    _check_cifar(root, sources)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _torchvision("cifar10", "CIFAR10", sources, mean, std)


def _root(kind: str, sources: DataSettings) -> Path:
    root = sources.data_root or os.environ.get("FEDKIT_DATA_ROOT", "")
    if not root:
        raise FedkitError(
            f"{kind} needs a folder of torchvision data sets: give --data-root FOLDER "
            "or set FEDKIT_DATA_ROOT."
        )
    if not Path(root).is_dir():
        raise FedkitError(f"The data root {root} is not a folder.")
    return Path(root)


def _torchvision(
    name: str,
    kind: str,
    sources: DataSettings,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DataSet:
    from torchvision import datasets

    root = _root(kind, sources)
    loader: Any = getattr(datasets, kind)
    if kind == "CIFAR10":
        # Our own check came before, and says which file and what to do.
        loader = type(kind, (loader,), {"_check_integrity": lambda self: True})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train = loader(str(root), train=True, download=False)
            test = loader(str(root), train=False, download=False)
    except Exception as error:  # damaged files raise whatever their format's reader meets
        folder = "cifar-10-batches-py" if kind == "CIFAR10" else f"{kind}/raw"
        raise FedkitError(
            f"{kind} can't be read from {root} ({error}): its files are expected in "
            f'{root}/{folder}; `python -c "from torchvision.datasets import {kind}; '
            f"{kind}('{root}', download=True)\"` gets them."
        ) from error
    scale = torch.tensor(mean) * 255, torch.tensor(std) * 255
    return DataSet(
        name,
        train=Samples(_images(train.data), torch.as_tensor(train.targets), *scale),
        test=Samples(_images(test.data), torch.as_tensor(test.targets), *scale),
        classes=tuple(train.classes),
    )


def _images(data: Any) -> torch.Tensor:
    images = torch.as_tensor(data)
    grey = images.dim() == 3
    return images.unsqueeze(1) if grey else images.permute(0, 3, 1, 2).contiguous()


def _check_cifar(root: Path, sources: DataSettings) -> None:
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    wanted = [*CIFAR10.train_list, *CIFAR10.test_list]
    for file, published in wanted:
        path = folder / file
        if not path.is_file():
            raise FedkitError(
                f'CIFAR10 has no file {path}; `python -c "from torchvision.datasets import '
                f"CIFAR10; CIFAR10('{root}', download=True)\"` gets it."
            )
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found == published:
            continue
        if not sources.allow_checksum_mismatch:
            raise FedkitError(
                f"{path} has the md5 {found}, not the published {published}: get the original, or "
                "pass --allow-checksum-mismatch if you trust this file (it is a pickle)."
            )
        warnings.warn(f"{path} is not the published file (md5 {found}).", stacklevel=2)
