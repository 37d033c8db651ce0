"""Data sets from a function of the user's own: ``package.module:function``, with all checks at the door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkit.data.samples import DataSet, Pool, pool_of
from fedkit.errors import FedkitError

MOST_CLASSES = 65536
FORM = "((x_train, y_train), (x_test, y_test)), or these two and the classes' names"


def from_function(spec: str, function: Callable[..., Any], argument: str | None) -> DataSet:
    """What ``function()``, or ``function(argument)`` where ``spec`` has one, makes.

    It returns a ``DataSet``, or ``((x_train, y_train), (x_test, y_test))`` with the classes' names as a
    third item if they have any. Arrays are NumPy's or torch's: images in uint8, n x channels x height x
    width, n x height x width x channels (where only the last length is 1 or 3), or n x height x width;
    or features, n x d, in any float. Labels are whole numbers from 0. Mean and standard deviation are
    those of the training part.

    Raises:
        FedkitError: the function failed, or returned something else.
    """
    try:
        made = function() if argument is None else function(argument)
    except FedkitError:
        raise
    except Exception as error:  # whatever somebody's code raises
        raise FedkitError(
            f"The data set {spec} failed: {type(error).__name__}: {error}."
        ) from error
    if isinstance(made, DataSet):
        return _checked(spec, made)
    try:
        ((x_train, y_train), (x_test, y_test)), names = _parts(made)
    except (TypeError, ValueError) as error:
        raise FedkitError(f"The data set {spec} must return {FORM}.") from error
    train, test = _data(spec, "x_train", x_train), _data(spec, "x_test", x_test)
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise FedkitError(
            f"{spec}: x_train has samples of {_described(train)}, x_test of {_described(test)}."
        )
    train_labels = _labels(spec, "y_train", y_train, len(train))
    test_labels = _labels(spec, "y_test", y_test, len(test))
    classes = _classes(spec, names, torch.cat([train_labels, test_labels]))
    mean, std = _moments(train)
    return DataSet(
        spec,
        train=pool_of(train, train_labels, mean, std),
        test=pool_of(test, test_labels, mean, std),
        classes=classes,
    )


def _parts(made: Any) -> tuple[Any, Any]:
    if len(made) == 2:
        return tuple(made), None
    train, test, names = made
    return (train, test), names


def _data(spec: str, what: str, given: Any) -> Tensor:
    array = _array(spec, what, given)
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise FedkitError(
                f"{spec}: {what} has the shape {tuple(array.shape)}: images have 1 or 3 channels."
            )
    elif array.dtype.kind == "f" and array.ndim == 2:
        with np.errstate(over="ignore"):  # told below
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0]
            raise FedkitError(f"{spec}: {what} has no finite number in row {row}, column {column}.")
    else:
        raise FedkitError(
            f"{spec}: {what} is {array.dtype} of shape {tuple(array.shape)}: it must be images in uint8 "
            "(n x channels x height x width) or features in float (n x d)."
        )
    if 0 in array.shape[1:]:
        raise FedkitError(
            f"{spec}: {what} has the shape {tuple(array.shape)}: there is nothing in it."
        )
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _labels(spec: str, what: str, given: Any, count: int) -> Tensor:
    array = _array(spec, what, given)
    if array.shape != (count,):
        raise FedkitError(
            f"{spec}: {what} has the shape {tuple(array.shape)} for {count} samples: it must be ({count},)."
        )
    if count and (
        array.dtype.kind not in "iu" or array.min() < 0 or int(array.max()) >= MOST_CLASSES
    ):
        raise FedkitError(
            f"{spec}: {what} must be whole numbers from 0 to {MOST_CLASSES - 1}, not {array.dtype} "
            f"from {array.min()} to {array.max()}."
        )
    return torch.from_numpy(array.astype(np.int64))


def _classes(spec: str, names: Any, labels: Tensor) -> tuple[str, ...]:
    count = int(labels.max()) + 1 if len(labels) else 0
    if count < 1:
        raise FedkitError(f"The data set {spec} has no samples.")
    if names is None:
        return tuple(str(number) for number in range(count))
    classes = tuple(str(name) for name in names)
    if len(classes) < count or len(set(classes)) < len(classes):
        raise FedkitError(
            f"{spec}: there must be a name of its own for each of {count} classes, not {classes[:20]}."
        )
    return classes


def _moments(train: Tensor) -> tuple[Tensor, Tensor]:
    over = (0, 2, 3) if train.dim() == 4 else (0,)
    values = train.double()
    mean, std = values.mean(dim=over), values.std(dim=over, correction=0)
    # A channel or feature that never changes says nothing: it becomes zeros.
    return mean.float(), torch.where(std > 0, std, torch.ones_like(std)).float()


def _checked(spec: str, dataset: DataSet) -> DataSet:
    for what, pool in (("train", dataset.train), ("test", dataset.test)):
        labels = pool.labels if isinstance(pool, Pool) else None
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            raise FedkitError(f"{spec}: {what} must be a Pool whose labels are int64, n.")
        if pool.owners is not None and pool.owners.shape != labels.shape:
            raise FedkitError(
                f"{spec}: {what} must have an owner for each of {len(labels)} samples."
            )
        last = len(dataset.classes) - 1 if dataset.classes else 0
        if len(pool) and not 0 <= int(pool.labels.min()) <= int(pool.labels.max()) <= last:
            raise FedkitError(f"{spec}: {what} has labels that are not from 0 to {last}.")
    if dataset.train.shape != dataset.test.shape:
        raise FedkitError(
            f"{spec}: train has samples of shape {dataset.train.shape}, test of {dataset.test.shape}."
        )
    return dataset


def _array(spec: str, what: str, given: Any) -> NDArray[Any]:
    if isinstance(given, Tensor):
        # NumPy knows fewer kinds of floats than torch.
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    if not isinstance(given, np.ndarray):
        raise FedkitError(
            f"{spec}: {what} is a {type(given).__name__}: it must be an array of NumPy or torch."
        )
    return given


def _described(data: Tensor) -> str:
    return f"{tuple(data.shape[1:])} in {str(data.dtype).removeprefix('torch.')}"
