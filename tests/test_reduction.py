"""Weighted means: exact where they can be, otherwise as good as float64 (algorithms.md 0.3.2)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.knowledge.reduction import NothingToAverage, weighted_mean

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHAPES = st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4)])
WEIGHTS = st.one_of(st.integers(1, 60_000).map(float), st.floats(1e-3, 1e3))


@st.composite
def weighted_arrays(draw):
    count, shape = draw(st.integers(1, 8)), draw(SHAPES)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return weights, [
        np.asarray(scale * generator.standard_normal(shape), dtype=np.float32) for _ in weights
    ]


def mean_of(weights, arrays, name="w"):
    return weighted_mean((a, {name: w}) for a, w in zip(weights, arrays, strict=True))[name]


def oracle(weights, arrays):
    """The mean of each entry by exact summation, in float64."""
    result = np.empty(arrays[0].shape, dtype=np.float64)
    for at in np.ndindex(result.shape):
        products = [a * float(w[at]) for a, w in zip(weights, arrays, strict=True)]
        result[at] = math.fsum(products) / math.fsum(weights)
    return result


def assert_within_one_ulp(actual, wanted, arrays):
    # Where the terms cancel, what float64 rounded off may exceed an ulp of the little that is left.
    largest = max(float(np.abs(w).max()) for w in arrays)
    slack = np.spacing(np.abs(wanted).astype(np.float32)) + 1e-13 * largest
    assert (np.abs(actual.astype(np.float64) - wanted) <= slack).all()


@given(weighted_arrays())
def test_is_the_weighted_mean(case):
    weights, arrays = case
    mean = mean_of(weights, arrays)
    assert mean.dtype == np.float32
    assert mean.shape == arrays[0].shape
    assert_within_one_ulp(mean, oracle(weights, arrays), arrays)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10])
@pytest.mark.parametrize("weights", ["equal", "examples", "fractions"])
def test_identical_arrays_come_back_to_the_bit(count, weights):
    generator = np.random.default_rng(count)
    array = generator.standard_normal((200, 50)).astype(np.float32)
    array[0, :3] = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal, -0.0
    drawn = {
        "equal": np.ones(count),
        "examples": generator.integers(1, 60_000, count).astype(float),
        "fractions": generator.random(count),
    }[weights]
    np.testing.assert_array_equal(mean_of(list(drawn), [array] * count), array)


def test_float32_alone_would_not_do():
    """What the promise above is worth: the plain float32 mean of seven equal arrays is another."""
    array = np.random.default_rng(7).standard_normal(1000).astype(np.float32)
    total = np.zeros_like(array)
    for _ in range(7):
        total += array
    assert (total / np.float32(7) != array).any()


@given(weighted_arrays(), st.randoms(use_true_random=False))
def test_order_does_not_matter(case, random):
    weights, arrays = case
    order = list(range(len(weights)))
    random.shuffle(order)
    shuffled = mean_of([weights[at] for at in order], [arrays[at] for at in order])
    assert_within_one_ulp(shuffled, mean_of(weights, arrays).astype(np.float64), arrays)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keeps_the_dtype(dtype):
    assert mean_of([1.0, 3.0], [np.zeros(2, dtype), np.ones(2, dtype)]).tolist() == [0.75, 0.75]
    assert mean_of([1.0], [np.ones(2, dtype)]).dtype == dtype


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8))
def test_integers_take_their_maximum(counters):
    mean = mean_of([1.0] * len(counters), [np.array(value) for value in counters])
    assert mean.dtype == np.int64
    assert mean.shape == ()
    assert int(mean) == max(counters)


def test_given_arrays_are_not_written_to():
    first = {"w": np.ones(3, np.float32), "steps": np.array(1)}
    second = {"w": np.zeros(3, np.float32), "steps": np.array(9)}
    weighted_mean([(1.0, first), (1.0, second)])
    assert first["steps"] == 1
    assert first["w"].tolist() == [1, 1, 1]


@given(weighted_arrays(), st.integers(0, 8))
def test_weight_zero_is_left_out_exactly(case, at):
    weights, arrays = case
    at = min(at, len(weights))
    # Not even what is not finite, or has another shape, leaves a trace.
    odd = np.full((7, 7), np.nan, dtype=np.float32)
    with_odd = mean_of(
        [*weights[:at], 0.0, *weights[at:]],
        [*arrays[:at], odd, *arrays[at:]],
    )
    np.testing.assert_array_equal(with_odd, mean_of(weights, arrays))


def test_weight_zero_counts_for_no_integer():
    assert int(mean_of([1.0, 0.0], [np.array(3), np.array(8)])) == 3


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_nothing_to_average_is_said(weights):
    with pytest.raises(NothingToAverage, match="nothing"):
        mean_of(weights, [np.ones(2, np.float32)] * len(weights))


def test_takes_each_array_by_its_name():
    first = {"a": np.zeros(2, np.float32), "b": np.ones(1, np.float32)}
    second = {"b": np.full(1, 3, np.float32), "a": np.full(2, 2, np.float32)}
    mean = weighted_mean([(1.0, first), (1.0, second)])
    assert mean["a"].tolist() == [1, 1]
    assert mean["b"].tolist() == [2]


@pytest.mark.parametrize("other", [(3,), (1, 2), (2, 1), ()])
def test_other_shapes_are_refused_by_name(other):
    with pytest.raises(ValueError, match=r"w .*shape"):
        mean_of([1.0, 1.0], [np.ones(2, np.float32), np.ones(other, np.float32)])


@pytest.mark.parametrize("names", [["v"], ["v", "w"], []])
def test_other_names_are_refused(names):
    odd = {name: np.ones(2, np.float32) for name in names}
    with pytest.raises(ValueError, match="names"):
        weighted_mean([(1.0, {"w": np.ones(2, np.float32)}), (1.0, odd)])


def test_takes_one_reply_at_a_time():
    """A generator is enough: nobody has to hold all clients' models at once."""
    alive = []

    def replies():
        for value in range(4):
            alive.append(value)
            yield 1.0, {"w": np.full(2, value, np.float32)}

    assert weighted_mean(replies())["w"].tolist() == [1.5, 1.5]
    assert alive == [0, 1, 2, 3]
