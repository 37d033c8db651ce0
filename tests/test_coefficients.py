"""KT-pFL's matrix against float64 oracles written from the equations (algorithms.md 6)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.coefficients import (
    adaptive_rate,
    grow,
    mix,
    project_to_simplex,
    projection_step,
    softmax_step,
)

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SEEDS = st.integers(0, 2**32 - 1)


def soft_predictions(generator, clients, rows, classes, sharpness=2.0):
    scores = sharpness * generator.standard_normal((clients, rows, classes))
    exponentials = np.exp(scores - scores.max(axis=2, keepdims=True))
    return list((exponentials / exponentials.sum(axis=2, keepdims=True)).astype(np.float32))


def interior_matrix(generator, clients):
    """Rows on the simplex, every entry at least half of 1/N."""
    return 0.5 / clients + 0.5 * generator.dirichlet(np.ones(clients), size=clients)


def uniform(clients):
    return np.full((clients, clients), 1 / clients)


@st.composite
def cases(draw, most_rows=64):
    """A generator, c (interior), S_1 .. S_N and n_n / n."""
    generator = np.random.default_rng(draw(SEEDS))
    clients = draw(st.integers(1, 8))
    rows, classes = draw(st.integers(1, most_rows)), draw(st.integers(2, 12))
    soft = soft_predictions(generator, clients, rows, classes, draw(st.sampled_from([0.1, 1, 5])))
    examples = generator.integers(1, 1000, clients).astype(float)
    return interior_matrix(generator, clients), soft, examples / examples.sum()


# Oracles: explicit loops in float64.


def oracle_mix(row, soft):
    rows, classes = soft[0].shape
    target = np.zeros((rows, classes))
    for weight, predictions in zip(row, soft, strict=True):
        for i in range(rows):
            for j in range(classes):
                target[i, j] += weight * float(predictions[i, j])
    return target


def oracle_objective(c, soft, shares, penalty, divergence_weight):
    """sum_n (n_n/n) lambda KL(T_n || S_n) + rho ||c - 1/N||^2, KL averaged over samples."""
    total = 0.0
    for n, row in enumerate(c):
        target = oracle_mix(row, soft)
        for at in np.ndindex(target.shape):
            divergence = target[at] * math.log(target[at] / float(soft[n][at]))
            total += shares[n] * divergence_weight * divergence / len(target)
        total += penalty * sum((entry - 1 / len(c)) ** 2 for entry in row)
    return total


def oracle_gradient(c, soft, shares, penalty, divergence_weight):
    gradient = np.zeros_like(c)
    for n in range(len(c)):
        target = oracle_mix(c[n], soft)
        for other in range(len(c)):
            inner = 0.0
            for at in np.ndindex(target.shape):
                ratio = math.log(target[at] / float(soft[n][at])) + 1
                inner += float(soft[other][at]) * ratio
            gradient[n, other] = divergence_weight * shares[n] * inner / len(target)
            gradient[n, other] += 2 * penalty * (c[n, other] - 1 / len(c))
    return gradient


def oracle_projection(row):
    """The simplex point v - theta clipped at 0, theta found by bisection."""
    low, high = row.min() - 1.0, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(row - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(row - (low + high) / 2, 0)


def oracle_softmax_step(c, soft, penalty):
    clients, (rows, classes) = len(c), soft[0].shape
    stepped = np.zeros_like(c)
    for k in range(clients):
        target = oracle_mix(c[k], soft)
        gradient = np.zeros(clients)
        for other in range(clients):
            inner = 0.0
            for at in np.ndindex(target.shape):
                inner += (float(soft[k][at]) - target[at]) * float(soft[other][at])
            gradient[other] = -2 / (rows * classes) * inner
            gradient[other] += 2 * penalty / clients * (c[k, other] - 1 / clients)
        size, rate = sum(abs(entry) for entry in gradient) / clients, 1.0
        for _ in range(5):
            if size > 0.01:
                size, rate = size / 5, rate / 5
            if size < 0.01:
                size, rate = size * 5, rate * 5
        powers = [math.exp(5 * (c[k, at] - rate * gradient[at])) for at in range(clients)]
        stepped[k] = [power / sum(powers) for power in powers]
    return stepped


def assert_on_simplex(rows):
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=0, atol=1e-6)


@given(cases())
def test_mix_is_the_weighted_sum(case):
    c, soft, _ = case
    for row, target in zip(c, mix(c, soft), strict=True):
        assert target.dtype == np.float32
        wanted = oracle_mix(row, soft)
        assert (np.abs(target - wanted) <= np.spacing(wanted.astype(np.float32))).all()


@given(cases())
def test_mixtures_are_distributions(case):
    c, soft, _ = case
    for target in mix(c, soft):
        assert (target >= 0).all()
        np.testing.assert_allclose(target.sum(axis=1), 1, atol=1e-6)


@given(cases())
def test_unit_matrix_gives_everyone_their_own(case):
    _, soft, _ = case
    for target, own in zip(mix(np.eye(len(soft)), soft), soft, strict=True):
        np.testing.assert_array_equal(target, own)


@given(cases())
def test_identical_predictions_mix_to_themselves(case):
    c, soft, _ = case
    for target in mix(c, [soft[0]] * len(soft)):
        np.testing.assert_array_max_ulp(target, soft[0], maxulp=1)


@settings(max_examples=40)
@given(cases(most_rows=6), st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 1.0, 2.5]))
def test_projection_step_follows_the_objective(case, penalty, weight):
    """A step too small to reach the border moves along the gradient, less its mean over the row."""
    c, soft, shares = case
    rate, width = 1e-5, 1e-5
    stepped = projection_step(c, soft, shares, rate=rate, penalty=penalty, divergence_weight=weight)
    differences = np.empty_like(c)
    for at in np.ndindex(c.shape):
        up, down = c.copy(), c.copy()
        up[at] += width
        down[at] -= width
        higher = oracle_objective(up, soft, shares, penalty, weight)
        differences[at] = higher - oracle_objective(down, soft, shares, penalty, weight)
    gradient = differences / (2 * width)
    wanted = gradient - gradient.mean(axis=1, keepdims=True)
    np.testing.assert_allclose((c - stepped) / rate, wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(cases(most_rows=16), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.0, 0.7, 3.0]))
def test_projection_step_is_the_projected_gradient_step(case, rate, penalty):
    c, soft, shares = case
    stepped = projection_step(c, soft, shares, rate=rate, penalty=penalty, divergence_weight=1.5)
    moved = c - rate * oracle_gradient(c, soft, shares, penalty, 1.5)
    wanted = np.array([oracle_projection(row) for row in moved])
    np.testing.assert_allclose(stepped, wanted, rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(cases(most_rows=16), st.sampled_from([0.0, 0.1, 0.7, 3.0]))
def test_softmax_step_is_the_codes(case, penalty):
    c, soft, _ = case
    stepped = softmax_step(c, soft, penalty=penalty)
    np.testing.assert_allclose(stepped, oracle_softmax_step(c, soft, penalty), rtol=0, atol=1e-9)


@given(cases(), st.floats(0, 100), st.floats(0, 10), st.floats(0, 10))
def test_rows_stay_on_the_simplex(case, rate, penalty, weight):
    c, soft, shares = case
    assert_on_simplex(softmax_step(c, soft, penalty=penalty))
    assert_on_simplex(
        projection_step(c, soft, shares, rate=rate, penalty=penalty, divergence_weight=weight)
    )


@given(SEEDS, st.integers(2, 8))
def test_one_hot_predictions_are_no_trouble(seed, clients):
    """Where T or S is exactly 0 the logarithm must not spoil the matrix."""
    generator = np.random.default_rng(seed)
    soft = [np.eye(4, dtype=np.float32)[generator.integers(0, 4, 10)] for _ in range(clients)]
    for c in (uniform(clients), np.eye(clients)):
        shares = np.full(clients, 1 / clients)
        assert_on_simplex(
            projection_step(c, soft, shares, rate=0.01, penalty=0.7, divergence_weight=1.0)
        )
        assert_on_simplex(softmax_step(c, soft, penalty=0.7))


@given(cases())
def test_identical_predictions_leave_the_uniform_matrix(case):
    _, soft, shares = case
    same, even = [soft[0]] * len(soft), uniform(len(soft))
    stepped = projection_step(even, same, shares, rate=0.01, penalty=0.7, divergence_weight=1.0)
    np.testing.assert_allclose(stepped, even, rtol=0, atol=1e-9)
    np.testing.assert_allclose(softmax_step(even, same, penalty=0.7), even, rtol=0, atol=1e-9)


@given(SEEDS, st.integers(2, 8), st.sampled_from(["projection", "softmax"]))
def test_identical_clients_keep_equal_columns(seed, clients, update):
    generator = np.random.default_rng(seed)
    shares = np.full(clients, 1 / clients)
    c = uniform(clients)
    for _ in range(3):
        soft = soft_predictions(generator, clients, 20, 5)
        soft[-1] = soft[0]
        if update == "softmax":
            c = softmax_step(c, soft, penalty=0.7)
        else:
            c = projection_step(c, soft, shares, rate=0.1, penalty=0.7, divergence_weight=1.0)
        np.testing.assert_allclose(c[:, 0], c[:, -1], rtol=0, atol=1e-12)


@given(cases(), SEEDS, st.sampled_from(["projection", "softmax"]))
def test_a_row_does_not_depend_on_other_rows(case, seed, update):
    c, soft, shares = case
    other = interior_matrix(np.random.default_rng(seed), len(soft))
    other[0] = c[0]

    def step(matrix):
        if update == "softmax":
            return softmax_step(matrix, soft, penalty=0.7)
        return projection_step(matrix, soft, shares, rate=1, penalty=0.7, divergence_weight=1.0)

    np.testing.assert_allclose(step(other)[0], step(c)[0], rtol=0, atol=1e-14)


@given(cases())
def test_a_large_penalty_pulls_to_uniform(case):
    c, soft, shares = case
    for _ in range(60):
        c = projection_step(c, soft, shares, rate=1e-7, penalty=1e6, divergence_weight=1.0)
    np.testing.assert_allclose(c, uniform(len(soft)), rtol=0, atol=1e-4)


@given(cases())
def test_without_penalty_the_code_prefers_oneself(case):
    """From 1/N the step on oneself is the mean step plus |S_k - T_k|^2: above the row's mean."""
    _, soft, _ = case
    scores = np.log(softmax_step(uniform(len(soft)), soft, penalty=0.0))
    assert (np.diag(scores) >= scores.mean(axis=1) - 1e-9).all()


@given(st.floats(math.log(3.3e-6), math.log(150)).map(math.exp))
def test_adaptive_rate_brings_the_step_into_range(mean_gradient):
    rate = adaptive_rate(mean_gradient)
    assert 0.01 - 1e-12 <= rate * mean_gradient <= 0.05 + 1e-12


@pytest.mark.parametrize(("mean_gradient", "rate"), [(0.0, 5.0**5), (0.01, 1.0), (1e9, 5.0**-5)])
def test_adaptive_rate_has_an_end(mean_gradient, rate):
    assert adaptive_rate(mean_gradient) == pytest.approx(rate)


@given(SEEDS, st.integers(1, 8), st.integers(1, 8))
def test_growing_leaves_room_for_new_clients(seed, old, new):
    c = np.random.default_rng(seed).dirichlet(np.ones(old), size=old)
    grown = grow(c, new)
    total = old + new
    assert grown.shape == (total, total)
    assert (grown[old:] == 1 / total).all()
    assert (grown[:, old:] == 1 / total).all()
    np.testing.assert_allclose(grown[:old, :old], c * (total - new) / total, rtol=1e-12)
    assert_on_simplex(grown)


def test_a_uniform_matrix_grows_to_a_uniform_one():
    np.testing.assert_allclose(grow(uniform(3), 2), uniform(5), rtol=1e-12)


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.sampled_from([1e-3, 1, 100, 1e6]))
def test_projection_is_the_bisected_one(seed, rows, columns, scale):
    points = scale * np.random.default_rng(seed).standard_normal((rows, columns))
    projected = project_to_simplex(points)
    wanted = np.array([oracle_projection(row) for row in points])
    np.testing.assert_allclose(projected, wanted, rtol=0, atol=1e-9 * max(scale, 1))


@given(SEEDS, st.integers(1, 12))
def test_projection_leaves_the_simplex_alone(seed, columns):
    points = np.random.default_rng(seed).dirichlet(np.ones(columns), size=4)
    np.testing.assert_allclose(project_to_simplex(points), points, rtol=0, atol=1e-12)


@given(SEEDS, st.integers(2, 12))
def test_projection_is_the_nearest_point(seed, columns):
    generator = np.random.default_rng(seed)
    point = generator.standard_normal((1, columns))
    nearest = np.linalg.norm(point - project_to_simplex(point))
    others = generator.dirichlet(np.ones(columns), size=50)
    assert (np.linalg.norm(point - others, axis=1) >= nearest - 1e-12).all()


def test_projection_takes_ties():
    np.testing.assert_allclose(project_to_simplex(np.array([[2.0, 2.0, 0.0]])), [[0.5, 0.5, 0.0]])
