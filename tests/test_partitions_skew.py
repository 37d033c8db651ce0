"""Measures of label skew against values computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedkit.data import skew

# Shards: one class of four; two equal ones; all alike; 1/2, 1/4, 1/8, 1/8.
COUNTS = np.array([[8, 0, 0, 0], [3, 0, 3, 0], [5, 5, 5, 5], [4, 2, 1, 1]])
WHOLE = np.array([10, 10, 10, 10])


def test_classes_are_counted_shard_by_shard():
    labels = np.array([2, 0, 2, 1, 2])
    counts = skew.class_counts(labels, [np.array([0, 2, 3]), np.array([4])], 4)
    assert counts.tolist() == [[0, 1, 2, 0], [0, 0, 1, 0]]


def test_total_variation_is_what_would_have_to_change_its_class():
    distance = skew.total_variation(COUNTS, WHOLE)
    assert distance == pytest.approx([0.75, 0.5, 0.0, 0.25])
    # 0.7 of class 0 and 0.1 of each other in the whole: half of 0.3 + 3 x 0.1.
    assert skew.total_variation(COUNTS[:1], np.array([7, 1, 1, 1])) == pytest.approx([0.3])


def test_effective_classes_are_the_exponential_of_the_entropy():
    # Entropy of the last: 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8 = 1.75 ln 2.
    assert skew.effective_classes(COUNTS) == pytest.approx([1, 2, 4, 2**1.75])


def test_the_largest_share_is_that_of_one_class():
    assert skew.largest_share(COUNTS) == pytest.approx([1, 0.5, 0.25, 0.5])


held = arrays.arrays(np.int64, (5, 7), elements=st.integers(0, 1000)).filter(
    lambda counts: (counts.sum(axis=1) > 0).all()
)


@given(held)
def test_measures_stay_in_their_range_and_do_not_hang_on_size(counts):
    whole = counts.sum(axis=0)
    distance, effective = skew.total_variation(counts, whole), skew.effective_classes(counts)
    assert (distance >= 0).all() and (distance <= 1).all()
    classes = (counts > 0).sum(axis=1)
    assert (effective >= 1 - 1e-12).all() and (effective <= classes + 1e-9).all()
    assert (1 / skew.largest_share(counts) <= effective + 1e-9).all()
    np.testing.assert_allclose(skew.total_variation(counts * 3, whole), distance)
    np.testing.assert_allclose(skew.effective_classes(counts * 3), effective)
