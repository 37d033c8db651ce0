"""The mean over holders (algorithms.md 7, invariants b, c and e)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.knowledge.held import HeldMean
from fedkit.knowledge.reduction import weighted_mean

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

WIDE = {"conv": (6, 4, 2), "bias": (6,), "scale": (), "head": (3, 6)}


def network(generator, dtype=np.float32):
    return {
        name: np.asarray(generator.standard_normal(shape), dtype) for name, shape in WIDE.items()
    }


def part(whole, kept):
    """The arrays of a client that holds these rows in each dimension."""
    return {
        name: array[np.ix_(*kept[name])] if array.ndim else array.copy()
        for name, array in whole.items()
        if name in kept
    }


@st.composite
def holders(draw):
    """Clients with a weight and random index sets, some without a tensor at all."""
    clients = []
    for _ in range(draw(st.integers(0, 5))):
        kept = {}
        for name, shape in WIDE.items():
            if draw(st.booleans()):
                kept[name] = tuple(
                    np.array(
                        sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))),
                        np.int64,
                    )
                    for size in shape
                )
        clients.append((draw(st.sampled_from([1.0, 3.0, 0.25, 0.0])), kept))
    return clients


@given(holders(), st.integers(0, 2**32 - 1))
def test_each_element_is_the_mean_of_exactly_its_holders(clients, seed):
    generator = np.random.default_rng(seed)
    before = network(generator)
    mean, told = HeldMean(before), []
    for weight, kept in clients:
        arrays = part(network(generator), kept)
        mean.add(weight, arrays, kept)
        told.append((weight, kept, arrays))
    result = mean.result()
    assert list(result) == list(before)
    for name, old in before.items():
        for at in np.ndindex(old.shape):
            held = []
            for weight, kept, arrays in told:
                sets = kept.get(name)
                if sets is None or not weight:
                    continue
                pairs = list(zip(at, sets, strict=True))
                if all(i in rows for i, rows in pairs):
                    where = tuple(rows.tolist().index(i) for i, rows in pairs)
                    held.append((weight, float(arrays[name][where])))
            if not held:
                assert result[name][at].tobytes() == old[at].tobytes()
                continue
            wanted = sum(a * w for a, w in held) / sum(a for a, _ in held)
            assert result[name][at] == np.float32(wanted)
        assert result[name].dtype == old.dtype and result[name].shape == old.shape


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_where_all_hold_everything_it_is_the_weighted_mean_to_the_bit(weights, seed):
    generator = np.random.default_rng(seed)
    before = network(generator) | {"steps": np.array(3)}
    models = [network(generator) | {"steps": np.array(at)} for at, _ in enumerate(weights)]
    mean = HeldMean(before)
    for weight, model in zip(weights, models, strict=True):
        mean.add(weight, model, {"bias": (slice(0, 6),)})
    wanted = weighted_mean(zip(weights, models, strict=True))
    for name, array in mean.result().items():
        assert array.tobytes() == wanted[name].tobytes() and array.dtype == wanted[name].dtype


def test_prefixes_as_slices_are_the_same_as_positions():
    generator = np.random.default_rng(1)
    before, narrow, wide = network(generator), network(generator), network(generator)
    kept = {
        name: tuple(np.arange((size + 1) // 2) for size in shape) for name, shape in WIDE.items()
    }
    cut = {name: tuple(slice(0, (size + 1) // 2) for size in s) for name, s in WIDE.items()}
    results = []
    for indices in (kept, cut):
        mean = HeldMean(before)
        mean.add(1.0, part(narrow, kept), indices)
        mean.add(1.0, wide)
        results.append(mean.result())
    for name in WIDE:
        assert results[0][name].tobytes() == results[1][name].tobytes()
    # Outside the narrow client's slice only the wide one counts.
    assert (results[0]["conv"][3:] == wide["conv"][3:]).all()
    inside = (narrow["bias"][:3].astype(float) + wide["bias"][:3]) / 2
    assert (results[0]["bias"][:3] == inside.astype(np.float32)).all()


def test_a_counter_takes_the_largest_of_its_holders_and_is_kept_by_nobody():
    before = {"steps": np.array(7), "rows": np.array([5, 6, 7])}
    mean = HeldMean(before)
    mean.add(1.0, {"steps": np.array(4), "rows": np.array([1, 9])}, {"rows": (np.array([0, 2]),)})
    mean.add(2.0, {"steps": np.array(-2)})
    result = mean.result()
    assert result["steps"] == 4 and result["rows"].tolist() == [1, 6, 9]


@pytest.mark.parametrize(
    ("arrays", "indices"),
    [
        ({"other": np.ones(2, np.float32)}, {}),
        ({"bias": np.ones(5, np.float32)}, {}),
        ({"bias": np.ones(6)}, {}),
        ({"bias": np.ones(2, np.float32)}, {"bias": (slice(0, 3),)}),
        ({"bias": np.ones(2, np.float32)}, {"bias": (slice(0, 2), slice(0, 1))}),
        ({"bias": np.ones(2, np.float32)}, {"bias": (np.array([0, 1, 2]),)}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_no_trace(arrays, indices):
    before = network(np.random.default_rng(1))
    mean = HeldMean(before)
    with pytest.raises(ValueError):
        mean.add(1.0, {"scale": np.float32(9) * np.ones((), np.float32), **arrays}, indices)
    for name, array in mean.result().items():
        assert array.tobytes() == before[name].tobytes()


def test_given_arrays_are_not_written_to():
    before, model = network(np.random.default_rng(1)), network(np.random.default_rng(2))
    copies = [{n: a.copy() for n, a in arrays.items()} for arrays in (before, model)]
    mean = HeldMean(before)
    mean.add(2.0, model)
    mean.result()
    for arrays, copy in zip((before, model), copies, strict=True):
        assert all((arrays[name] == copy[name]).all() for name in WIDE)
