"""The public subset of a round: how it is drawn, named and read."""

import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.knowledge import subset

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, total, count, **how):
    return subset.draw(np.random.default_rng(seed), total, count, **how)


@given(SEEDS, st.integers(1, 300), st.integers(1, 300))
def test_is_sorted_and_holds_no_sample_twice(seed, total, count):
    indices = drawn(seed, total, count)
    assert indices.dtype == np.int64
    assert len(indices) == min(count, total)
    assert (np.diff(indices) > 0).all()
    assert indices.min() >= 0
    assert indices.max() < total


@given(SEEDS, st.integers(1, 100), st.integers(0, 50), st.booleans())
def test_is_the_whole_set_where_that_is_small(seed, total, more, stratified):
    labels = np.random.default_rng(seed).integers(0, 4, total) if stratified else None
    indices = drawn(seed, total, total + more, strata=labels)
    assert indices.tolist() == list(range(total))


@given(SEEDS, st.integers(1, 100), st.integers(1, 100))
def test_with_replacement_a_sample_may_come_twice(seed, total, count):
    indices = drawn(seed, total, count, replacement=True)
    assert len(indices) == min(count, total)
    assert (np.diff(indices) >= 0).all()
    assert set(indices.tolist()) <= set(range(total))


def test_replacement_is_real():
    assert len(set(drawn(1, 100, 100, replacement=True).tolist())) < 100


@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.integers(1, 10))
def test_stratified_keeps_each_labels_share_within_one(seed, total, count, classes):
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, size=total, p=generator.dirichlet(np.ones(classes)))
    indices = drawn(seed, total, count, strata=labels)
    count = min(count, total)
    assert len(indices) == count
    assert (np.diff(indices) > 0).all()
    taken = np.bincount(labels[indices], minlength=classes)
    wanted = np.bincount(labels, minlength=classes) * count / total
    assert (np.abs(taken - wanted) < 1).all()


def test_stratified_is_drawn_anew():
    labels = np.arange(100) % 10
    first, second = (drawn(seed, 100, 20, strata=labels).tolist() for seed in (1, 2))
    assert first != second


@given(SEEDS)
def test_the_same_generator_draws_the_same(seed):
    np.testing.assert_array_equal(drawn(seed, 500, 50), drawn(seed, 500, 50))


def test_every_sample_is_drawn_as_often():
    """1000 draws of 10 from 50: each sample comes 200 times, within five standard deviations."""
    generator = np.random.default_rng(3)
    counts = np.zeros(50)
    for _ in range(1000):
        counts[subset.draw(generator, 50, 10)] += 1
    assert (np.abs(counts - 200) < 5 * np.sqrt(1000 * 0.2 * 0.8)).all()


def test_digest_is_eight_bytes_of_sha256():
    indices = np.array([1, 2, 70_000])
    wanted = hashlib.sha256(b"\0\0\0\1" + b"\0\0\0\2" + b"\0\1\x11\x70").hexdigest()[:16]
    assert subset.digest(indices) == wanted


@given(st.permutations(range(6)))
def test_digest_depends_on_the_order(order):
    same = order == list(range(6))
    assert (subset.digest(np.array(order)) == subset.digest(np.arange(6))) == same


def test_digest_depends_on_every_index():
    whole = np.arange(100)
    digests = {subset.digest(np.delete(whole, at)) for at in range(100)}
    assert len(digests | {subset.digest(whole)}) == 101


@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_what_was_sent_is_read(seed, total, count, replacement):
    indices = drawn(seed, total, count, replacement=replacement)
    record = subset.record(indices)
    back = subset.read(record, total)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, indices)
    assert record["indices"].numpy().nbytes == 4 * len(indices)


@pytest.mark.parametrize(
    "indices",
    [
        np.array([], dtype=np.int32),
        np.array(3, dtype=np.int32),
        np.array([[1, 2]], dtype=np.int32),
        np.array([1.0, 2.0], dtype=np.float32),
        np.array([1, 2], dtype=np.int64),
        np.array([True, False]),
    ],
    ids=["empty", "scalar", "matrix", "float", "int64", "bool"],
)
def test_what_is_no_list_of_indices_is_refused(indices):
    with pytest.raises(ValueError, match="not a list of indices"):
        subset.read(ArrayRecord({"indices": Array(indices)}), 10)


@pytest.mark.parametrize("indices", [[-1, 2], [3, 10], [2**31 - 1], [-(2**31)]])
def test_indices_beyond_the_public_set_are_refused(indices):
    record = ArrayRecord({"indices": Array(np.array(indices, dtype=np.int32))})
    with pytest.raises(ValueError, match="beyond the 10 public samples"):
        subset.read(record, 10)


def test_a_record_without_indices_is_refused():
    with pytest.raises(ValueError, match="not a list of indices"):
        subset.read(ArrayRecord(), 10)
