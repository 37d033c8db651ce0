"""Data of the user's own: a function is believed nothing, and ``own`` names classes without samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkit import registry
from fedkit.data.datasets import open_dataset
from fedkit.data.function import from_function
from fedkit.data.samples import Form
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

SPEC = "mine:data"


def made(value):
    return from_function(SPEC, lambda: value, None)


def parts(x, count=6, test=2, classes=3):
    labels = np.arange(count + test) % classes
    return ((x(count), labels[:count]), (x(test), labels[count:]))


def bytes_of(*shape):
    return lambda count: np.random.default_rng(count).integers(
        0, 256, (count, *shape), dtype=np.uint8
    )


def floats_of(*shape):
    return lambda count: np.random.default_rng(count).normal(3, 2, (count, *shape))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((3, 5, 4), (3, 5, 4)),
        ((5, 4), (1, 5, 4)),
        ((5, 4, 3), (3, 5, 4)),
        ((5, 4, 1), (1, 5, 4)),
        ((1, 5, 3), (1, 5, 3)),
        ((3, 3, 3), (3, 3, 3)),
    ],
)
def test_images_may_have_their_channels_first_last_or_not_at_all(given, shape):
    value = parts(bytes_of(*given))
    data = made(value)
    assert data.train.shape == shape and data.train.all().data.is_contiguous()
    image = value[0][0][1]
    moved = image.transpose(2, 0, 1) if given[-1] == shape[0] and given != shape else image
    assert np.array_equal(data.train.all().data[1].numpy(), moved.reshape(shape))
    assert data.classes == ("0", "1", "2") and data.name == SPEC


def test_inputs_are_normalised_by_the_training_part():
    for value in (parts(bytes_of(3, 5, 4), 50), parts(floats_of(7), 50)):
        inputs = made(value).train.all().inputs(slice(None)).double()
        over = (0, 2, 3) if inputs.dim() == 4 else (0,)
        assert inputs.mean(dim=over).abs().max() < 1e-5
        assert (inputs.std(dim=over, correction=0) - 1).abs().max() < 1e-5
        assert made(value).test.mean.equal(made(value).train.mean)


def test_tensors_and_names_are_taken():
    train, test = parts(floats_of(4))
    tensors = tuple((torch.from_numpy(x), torch.from_numpy(y)) for x, y in (train, test))
    data = made((*tensors, ["a", "b", "c", "d"]))
    assert data.classes == ("a", "b", "c", "d") and data.train.all().data.dtype == torch.float32
    assert made((tensors, ("a", "b", "c"))[0]).classes == ("0", "1", "2")


def test_a_data_set_is_taken_as_it_is():
    data = open_dataset("digits", DataSettings())
    assert made(data) is data
    for spoilt in (
        replace(data, test=3),
        replace(data, train=replace(data.train, labels=data.train.labels.tolist())),
        replace(data, train=replace(data.train, labels=data.train.labels + 1)),
        replace(data, train=replace(data.train, owners=torch.zeros(3))),
        replace(data, test=replace(data.test, shape=(1, 4, 4))),
    ):
        with pytest.raises(FedkitError, match="mine:data: t"):
            made(spoilt)


X, Y = floats_of(4)(6), np.arange(6) % 3
TEST = floats_of(4)(2), np.array([0, 1])


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "must return"),
        ((1, 2), "must return"),
        (((X, Y), TEST, ["a", "b", "c"], 4), "must return"),
        (((X[:, :, None], Y), TEST), r"x_train is float64 of shape \(6, 4, 1\)"),
        (((X.astype(np.int64), Y), TEST), "x_train is int64"),
        (((X.tolist(), Y), TEST), "x_train is a list"),
        (((np.where(X[2, 1] == X, np.nan, X), Y), TEST), "no finite number in row 2, column 1"),
        (((X * 1e39, Y), TEST), "no finite number"),
        (((X, Y[:5]), TEST), r"y_train has the shape \(5,\) for 6 samples"),
        (((X, Y * 1.0), TEST), "y_train must be whole numbers"),
        (((X, Y - 1), TEST), "y_train must be whole numbers"),
        (((X, Y + 10**9), TEST), "y_train must be whole numbers"),
        (((X, Y > 1), TEST), "y_train must be whole numbers"),
        (((torch.ones(6, 4, dtype=torch.bfloat16), Y), (TEST[0].tolist(), Y)), "x_test is a list"),
        (((X, Y), (TEST[0][:, :3], TEST[1])), r"samples of \(4,\) in float32, x_test of \(3,\)"),
        (((X, Y), TEST, ["a", "b"]), "each of 3 classes"),
        (((X, Y), TEST, ["a", "b", "a"]), "each of 3 classes"),
        (parts(bytes_of(2, 5, 4)), "1 or 3 channels"),
        (parts(bytes_of(0, 4)), "nothing in it"),
        (((X[:0], Y[:0]), (TEST[0][:0], TEST[1][:0])), "has no samples"),
    ],
)
def test_everything_else_is_refused_in_a_sentence(value, sentence):
    with pytest.raises(FedkitError, match=sentence) as caught:
        made(value)
    assert SPEC in str(caught.value)


def test_a_function_that_fails_is_no_traceback():
    def broken():
        raise KeyError("sensor")

    with pytest.raises(FedkitError, match="mine:data failed: KeyError: 'sensor'"):
        from_function(SPEC, broken, None)


def test_a_function_is_found_by_name_and_gets_its_argument(tmp_path, monkeypatch):
    (tmp_path / "my_readings.py").write_text(
        "import numpy as np\n"
        "def readings(width='2'):\n"
        "    x = np.ones((4, int(width)), dtype=np.float32)\n"
        "    return (x, np.array([0, 1, 0, 1])), (x[:2], np.array([0, 1]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_allowed", set())
    with pytest.raises(UsageError, match="--allow my_readings:readings"):
        open_dataset("my_readings:readings", DataSettings())
    registry.allow("my_readings:readings")
    assert open_dataset("my_readings:readings", DataSettings()).train.shape == (2,)
    data = open_dataset("my_readings:readings:5", DataSettings())
    assert data.train.shape == (5,) and data.name == "my_readings:readings:5"


@pytest.mark.parametrize("form", [Form((3, 8, 8)), Form((1, 8, 8)), Form((2,), ("a", "b"))])
def test_own_has_the_public_sets_form_and_no_samples(form):
    data = open_dataset("own:cat,dog", DataSettings(), form)
    assert data.classes == ("cat", "dog") and data.columns == form.columns
    for pool in (data.train, data.test):
        assert len(pool) == 0 and pool.shape == form.shape
        assert pool.all().data.shape == (0, *form.shape)


@pytest.mark.parametrize("argument", ["", ":", ":cat", ":cat,cat", ":cat,", ":cat, ,dog"])
def test_own_takes_two_different_names_or_more(argument):
    with pytest.raises(UsageError, match="two or more different classes"):
        open_dataset(f"own{argument}", DataSettings(), Form((3, 8, 8)))


def test_own_holds_nothing_by_itself():
    with pytest.raises(UsageError, match="holds nothing"):
        open_dataset("own:cat,dog", DataSettings())
