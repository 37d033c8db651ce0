"""Arrays are written for messages as Flower writes them, to the byte, and read as NumPy reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedkit.knowledge.arrays import as_array, as_arrays, from_state_dict, read_array

KINDS = st.sampled_from(["<f4", "<f8", "<f2", ">f4", "<i8", "|u1", "|b1", "<u2"])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ANY = KINDS.flatmap(lambda kind: SHAPES.flatmap(lambda shape: arrays.arrays(kind, shape)))


def told(array: Array) -> tuple[str, tuple[int, ...], str, bytes]:
    return array.dtype, tuple(array.shape), array.stype, array.data


@given(ANY)
def test_an_array_is_written_as_flower_writes_it(values):
    assert told(as_array(values)) == told(Array(values))


@given(ANY)
def test_so_is_one_that_is_not_contiguous(values):
    other = values.T[..., ::2] if values.ndim else values
    assert told(as_array(other)) == told(Array(other))


@given(ANY)
def test_what_was_written_is_read_again(values):
    again = read_array("it", as_array(values))
    assert again.dtype == values.dtype
    assert again.tobytes() == values.tobytes()


def test_a_network_is_written_as_flower_writes_it():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3))
    network = network.to(memory_format=torch.channels_last)
    state = network.state_dict()
    ours, flowers = from_state_dict(state), ArrayRecord(state)
    assert list(ours) == list(flowers)
    assert [told(one) for one in ours.values()] == [told(one) for one in flowers.values()]


def test_a_record_does_not_change_with_the_network():
    network = torch.nn.Linear(2, 2)
    record = from_state_dict(network.state_dict())
    before = as_arrays(record)
    with torch.no_grad():
        network.weight.zero_()
    assert all((as_arrays(record)[name] == values).all() for name, values in before.items())


def test_objects_are_never_written():
    with pytest.raises(ValueError, match="allow_pickle"):
        as_array(np.array([object()]))
