"""Data sets by name: this is the door, the readers are beside it.

Nothing is downloaded: a device in the field or a cluster node may have no way out, and a data set
that changes under one's feet spoils every number. The error says how to get the files.
"""

from __future__ import annotations

import numpy as np
import torch

from fedkit.data.found import refuse_argument
from fedkit.data.function import from_function
from fedkit.data.samples import DataSet, Form, Samples, pool_of
from fedkit.registry import code_of, find
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings

DIGITS_TEST = 397


def open_dataset(spec: str, sources: DataSettings, form: Form | None = None) -> DataSet:
    """The data set that ``spec`` names.

    Args:
        spec: a registered name or a function of the user's own, with an argument after a colon.
        sources: where this machine keeps data sets.
        form: what its samples shall look like, for data sets that can be read in several forms.

    Raises:
        UsageError: there is no such data set, or it may not be read.
        FedkitError: its files are missing, damaged, or not the published ones.
    """
    loader, argument = find("datasets", spec)
    if code_of("datasets", spec) is not None:
        return from_function(spec, loader, argument)
    dataset: DataSet = loader(argument, sources, form)
    return dataset


def digits(argument: str | None, sources: DataSettings, form: Form | None = None) -> DataSet:
    """scikit-learn's 1,797 real handwritten digits, 8x8 grey, 10 classes; no download.

    The set has no official test split: 397 images are set aside, the same for every seed.
    """
    from sklearn.datasets import load_digits

    refuse_argument("digits", argument)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(numpy_generator(0, "digits official test split").permutation(1797))
    every = Samples(images, labels, torch.tensor([4.884]), torch.tensor([6.017]))
    train = every.take(order[DIGITS_TEST:].sort().values)
    test = every.take(order[:DIGITS_TEST].sort().values)
    return DataSet(
        "digits",
        train=pool_of(train.data, train.labels, train.mean, train.std),
        test=pool_of(test.data, test.labels, test.mean, test.std),
        classes=tuple(str(digit) for digit in range(10)),
    )
