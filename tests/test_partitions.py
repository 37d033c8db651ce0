"""Partitions: the contract that all keep, and what each promises (algorithms.md 9)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.data.partitions import MIN_SHARD, deal, digest
from fedkit.errors import UsageError
from fedkit.registry import names

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SPECS = ["iid", "dirichlet:0.5", "dirichlet:100", "classes:2", "classes:10"]
LARGE = np.repeat(np.arange(10), 5000)
SMALL = np.repeat(np.arange(10), 100)


def dealt(spec, labels, shards, seed=1):
    return deal(spec, labels, shards, np.random.default_rng(seed))


def shares(part, labels):
    counts = np.bincount(labels[part], minlength=int(labels.max()) + 1)
    return counts / counts.sum()


def median_top_share(spec, seed):
    return np.median([shares(part, LARGE).max() for part in dealt(spec, LARGE, 20, seed)])


def assert_keeps_contract(parts, labels, shards):
    assert len(parts) == shards
    for part in parts:
        assert part.dtype == np.int64
        assert len(part)
        assert (np.diff(part) > 0).all()
    every = np.concatenate(parts)
    np.testing.assert_array_equal(np.sort(every), np.arange(len(labels)))


def test_these_are_all_partitions():
    assert names("partitions") == ["classes", "dirichlet", "iid"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shards", [1, 5, 8, 20])
@pytest.mark.parametrize("seed", [1, 2])
def test_shards_are_sorted_disjoint_and_complete(spec, shards, seed):
    labels = np.random.default_rng(seed).permutation(SMALL)
    if spec == "classes:2" and shards == 1:
        pytest.skip("one shard can't hold ten classes and two")
    assert_keeps_contract(dealt(spec, labels, shards, seed), labels, shards)


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_deals_the_same(spec):
    first, second, third = (dealt(spec, SMALL, 8, seed) for seed in (1, 1, 2))
    assert digest(first) == digest(second)
    assert digest(first) != digest(third)


@pytest.mark.parametrize("spec", SPECS)
def test_labels_are_not_written_to(spec):
    labels = SMALL.copy()
    dealt(spec, labels, 8)
    np.testing.assert_array_equal(labels, SMALL)


@given(st.integers(1, 200), st.data(), st.integers(0, 2**32 - 1))
def test_iid_shards_differ_by_one_at_most(count, data, seed):
    shards = data.draw(st.integers(1, count))
    parts = dealt("iid", np.zeros(count, dtype=np.int64), shards, seed)
    assert_keeps_contract(parts, np.zeros(count), shards)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_iid_is_shuffled():
    assert all(len(set(LARGE[part])) == 10 for part in dealt("iid", LARGE, 20))


@pytest.mark.parametrize("seed", range(5))
def test_a_huge_alpha_deals_like_the_whole(seed):
    labels = np.repeat(np.arange(10), np.arange(1, 11) * 1000)
    for part in dealt("dirichlet:1e6", labels, 20, seed):
        np.testing.assert_allclose(shares(part, labels), np.arange(1, 11) / 55, atol=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_small_alphas_skew_as_calibrated(seed):
    assert 0.5 <= median_top_share("dirichlet:0.1", seed) <= 0.9
    assert 0.2 <= median_top_share("dirichlet:1", seed) <= 0.4


@pytest.mark.parametrize("seed", range(5))
def test_no_dirichlet_shard_is_tiny(seed):
    assert min(len(part) for part in dealt("dirichlet:0.1", SMALL, 8, seed)) >= MIN_SHARD == 10


@pytest.mark.parametrize("alpha", ["1e-3", "1e-300"])
def test_shares_that_underflow_are_dealt_all_the_same(alpha):
    assert_keeps_contract(dealt(f"dirichlet:{alpha}", SMALL, 3), SMALL, 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_full_shard_gets_no_more_of_later_classes(seed):
    """The balance cap: beyond n/N a shard has at most the class that filled it."""
    for part in dealt("dirichlet:0.1", SMALL, 10, seed):
        labels = SMALL[part]
        assert (labels != labels.max()).sum() < len(SMALL) / 10


def test_no_place_in_the_row_is_special():
    """What rounding leaves over must not give one shard a sample of every class."""
    held = np.array(
        [
            [len(set(SMALL[part])) for part in dealt("dirichlet:0.1", SMALL, 10, seed)]
            for seed in range(60)
        ]
    )
    # About four classes a shard, 1.5 more or less from draw to draw: means within 5 deviations.
    assert np.abs(held.mean(axis=0) - held.mean()).max() < 5 * 1.5 / np.sqrt(60)


@pytest.mark.parametrize(("alpha", "shards"), [("0.01", 20), ("0.05", 100)])
def test_an_impossible_dirichlet_says_how_near_it_came(alpha, shards):
    with pytest.raises(UsageError, match=r"take a larger alpha or fewer shards") as refusal:
        dealt(f"dirichlet:{alpha}", np.repeat(np.arange(10), 140), shards)
    sentence = str(refusal.value)
    assert f"dirichlet:{alpha} " in sentence
    assert f"{shards} shards" in sentence
    best = int(sentence.partition("the best had ")[2].split()[0])
    assert 0 <= best < MIN_SHARD


@st.composite
def card_games(draw):
    classes = draw(st.integers(1, 12))
    held = draw(st.integers(1, classes))
    shards = draw(st.integers(-(-classes // held), 25))
    sizes = draw(st.lists(st.integers(25, 60), min_size=classes, max_size=classes))
    names = draw(st.permutations(range(classes)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return generator.permutation(np.repeat(names, sizes)), held, shards, generator


@given(card_games())
def test_every_shard_holds_exactly_k_classes(game):
    labels, held, shards, generator = game
    parts = deal(f"classes:{held}", labels, shards, generator)
    assert_keeps_contract(parts, labels, shards)
    assert {len(set(labels[part])) for part in parts} == {held}


@given(card_games())
def test_every_class_is_held_by_equally_many(game):
    labels, held, shards, generator = game
    parts = deal(f"classes:{held}", labels, shards, generator)
    holders = [sum(kind in labels[part] for part in parts) for kind in np.unique(labels)]
    assert sum(holders) == held * shards
    assert max(holders) - min(holders) <= 1


@given(card_games())
def test_a_class_is_cut_equally_among_its_holders(game):
    labels, held, shards, generator = game
    parts = deal(f"classes:{held}", labels, shards, generator)
    for kind in np.unique(labels):
        pieces = [n for n in ((labels[part] == kind).sum() for part in parts) if n]
        assert max(pieces) - min(pieces) <= 1


def test_ten_shards_of_two_classes_are_the_lectures():
    parts = dealt("classes:2", LARGE, 10)
    assert [len(part) for part in parts] == [5000] * 10


@pytest.mark.parametrize(
    ("spec", "shards", "words"),
    [
        ("iid:3", 5, "no argument"),
        ("dirichlet", 5, "positive number"),
        ("dirichlet:", 5, "positive number"),
        ("dirichlet:0", 5, "positive number"),
        ("dirichlet:-1", 5, "positive number"),
        ("dirichlet:nan", 5, "positive number"),
        ("dirichlet:inf", 5, "positive number"),
        ("dirichlet:much", 5, "positive number"),
        ("classes", 5, "whole number"),
        ("classes:2.5", 5, "whole number"),
        ("classes:two", 5, "whole number"),
        ("classes:0", 5, "not possible with 10 classes"),
        ("classes:-1", 5, "not possible with 10 classes"),
        ("classes:11", 5, "not possible with 10 classes"),
        ("classes:2", 4, "leaves some of the 10 classes to nobody"),
        ("classes:10", 101, "class 0 has 100 samples for its 101 shards"),
        ("iid", 1001, "1000 private samples can't be dealt into 1001 shards"),
        ("classes:2", 1001, "1000 private samples can't be dealt into 1001 shards"),
        ("dirichlett:1", 5, "did you mean dirichlet"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, shards, words):
    with pytest.raises(UsageError, match=words):
        dealt(spec, SMALL, shards)


def test_digest_depends_on_who_holds_what():
    parts = [np.array([0, 1]), np.array([2, 3])]
    others = [
        [parts[1], parts[0]],
        [np.array([0]), np.array([1, 2, 3])],
        [np.array([0, 1, 2, 3])],
        [*parts, np.array([], dtype=np.int64)],
        [np.array([0, 1]), np.array([2, 4])],
    ]
    assert len({digest(deal) for deal in [parts, *others]}) == 6
