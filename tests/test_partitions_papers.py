"""Partitions of one paper or lecture each, the data's own, and shared pools: what each promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.data.partitions import Labelled, deal, digest
from fedkit.errors import UsageError

LARGE = np.repeat(np.arange(10), 6000)
SMALL = np.repeat(np.arange(10), 100)


def dealt(spec, labels, shards, seed=1, owners=None):
    return deal(spec, Labelled(labels, owners), shards, np.random.default_rng(seed))


def class_counts(whole, labels):
    return np.array([np.bincount(labels[part], minlength=10) for part in whole.parts])


# --- quantity ---


@pytest.mark.parametrize("seed", range(5))
def test_quantity_skews_sizes_and_leaves_labels_alone(seed):
    whole = dealt("quantity:1", LARGE, 20, seed)
    sizes = np.array([len(part) for part in whole.parts])
    assert sizes.max() > 3 * sizes.min() and sizes.sum() == len(LARGE)
    for part in whole.parts:
        # Five standard deviations of a draw of so many samples.
        tolerance = 5 * np.sqrt(0.09 / len(part))
        np.testing.assert_allclose(
            np.bincount(LARGE[part], minlength=10) / len(part), 0.1, atol=tolerance
        )


def test_quantity_with_a_huge_alpha_is_even():
    sizes = [len(part) for part in dealt("quantity:1e8", LARGE, 20).parts]
    assert max(sizes) - min(sizes) <= 10


def test_sizes_have_the_law_of_dirichlet():
    """Dir(2) over 5: a share has the mean 1/5 and the variance (1/5)(4/5)/(10+1)."""
    sizes = [len(dealt("quantity:2,min=1", SMALL, 5, seed).parts[0]) / 1000 for seed in range(400)]
    assert np.mean(sizes) == pytest.approx(0.2, abs=0.02)
    assert np.var(sizes) == pytest.approx(0.16 / 11, rel=0.3)


# --- shards: McMahan et al. 2017 ---


def test_fedavgs_hundred_clients_have_two_pieces_of_300():
    whole = dealt("shards:2", LARGE, 100)
    assert {len(part) for part in whole.parts} == {600} and whole.dropped == 0
    pieces = np.sort(np.concatenate([part[::300] // 300 for part in whole.parts]))
    np.testing.assert_array_equal(pieces, np.arange(200))
    held = (class_counts(whole, LARGE) > 0).sum(axis=1)
    # Two random pieces have one class with the probability 19/199: about ten of the hundred clients.
    assert set(held) == {1, 2} and 2 <= (held == 1).sum() <= 22


def test_pieces_run_over_where_classes_end_inside_them():
    labels = np.repeat(np.arange(10), [50, 150] * 5)
    held = [
        (class_counts(dealt("shards:1", labels, 10, seed), labels) > 0).sum(axis=1)
        for seed in (1, 2)
    ]
    assert sorted(held[0]) == sorted(held[1]) == [1] * 5 + [2] * 5


# --- lecture ---


def test_the_lectures_first_gives_each_class_to_one_shard():
    whole = dealt("lecture:1", LARGE, 10)
    for shard, part in enumerate(whole.parts):
        np.testing.assert_array_equal(part, np.flatnonzero(shard == LARGE))


@pytest.mark.parametrize("seed", range(20))
def test_the_lectures_second_halves_every_class_between_two_shards(seed):
    counts = class_counts(dealt("lecture:2", LARGE, 10, seed), LARGE)
    assert set(counts.ravel()) == {0, 3000}
    assert ((counts > 0).sum(axis=0) == 2).all() and ((counts > 0).sum(axis=1) == 2).all()


def test_the_lectures_second_deals_two_classes_too():
    labels = np.array([0, 0, 0, 1, 1])
    whole = dealt("lecture:2", labels, 2)
    assert [set(labels[part]) for part in whole.parts] == [{0, 1}, {0, 1}]


# --- dominant: FedMarl ---


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("shards", [4, 20, 100])
def test_one_class_has_its_share_and_the_others_the_rest_evenly(share, shards):
    whole = dealt(f"dominant:{share}", LARGE, shards)
    for row in class_counts(whole, LARGE):
        first, others = row.max(), np.delete(row, row.argmax())
        assert first == round(share * row.sum())
        assert others.max() - others.min() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_dominants_sizes_follow_the_power_law(seed):
    whole = dealt("dominant:0.8", LARGE, 50, seed)
    sizes = np.sort([len(part) for part in whole.parts])[::-1]
    slope, _ = np.polyfit(np.log(np.arange(1, 51)), np.log(sizes), 1)
    assert slope == pytest.approx(-0.5, abs=0.01)
    # One class is used up, but for what rounding leaves over.
    assert class_counts(whole, LARGE).sum(axis=0).max() > 0.98 * 6000
    assert whole.dropped == len(LARGE) - sizes.sum() > 0


def test_every_class_is_main_in_turn():
    mains = class_counts(dealt("dominant:0.8", LARGE, 30), LARGE).argmax(axis=1)
    assert set(mains) == set(range(10))


# --- heterofl: Diao et al. 2021 ---


def test_heterofl_drops_what_repeated_labels_cost():
    """A shard's second piece repeats its first's label with 19/199: 9.5 of 200 pieces of 300, 4.8 %."""
    used = []
    for seed in range(40):
        whole = dealt("heterofl:2", LARGE, 100, seed)
        counts = class_counts(whole, LARGE)
        single = ((counts > 0).sum(axis=1) == 1).sum()
        assert set(counts.ravel()) == {0, 300}
        assert whole.dropped == 300 * single
        used.append(len(LARGE) - whole.dropped)
    # Three pieces more or less from draw to draw: within five standard errors.
    assert np.mean(used) == pytest.approx(
        60000 - 100 * 19 / 199 * 300, abs=5 * 3 * 300 / np.sqrt(40)
    )


def test_heterofl_never_deals_more_than_k_classes():
    counts = class_counts(dealt("heterofl:3", LARGE, 20), LARGE)
    assert set((counts > 0).sum(axis=1)) <= {1, 2, 3}


# --- KT-pFL ---


@pytest.mark.parametrize("seed", range(3))
def test_ktpfl1_gives_everybody_every_class_in_counts_that_differ(seed):
    whole = dealt("ktpfl1", LARGE, 20, seed)
    counts = class_counts(whole, LARGE)
    assert counts.min() >= 10 and whole.dropped == 0
    # Dir(1) over 20 has a coefficient of variation of nearly 1.
    assert 0.7 < (counts.std(axis=0) / counts.mean(axis=0)).mean() < 1.2


def test_ktpfl1_may_use_up_a_class_for_its_minima():
    assert (class_counts(dealt("ktpfl1:min=5", SMALL, 20), SMALL) == 5).all()


def reference_ktpfl2(sizes, users, generator):
    """The authors' loop (cugzj/KT-pFL and pFedMe), counting samples instead of copying them."""
    held = np.zeros((users, 10), dtype=int)
    index = np.zeros(10, dtype=int)
    for user in range(users):
        for j in range(2):
            held[user, (user + j) % 10] += 10
            index[(user + j) % 10] += 10
    props = generator.lognormal(0, 2.0, (10, users, 2))
    props = (
        np.array([[[size - users]] for size in sizes])
        * props
        / np.sum(props, (1, 2), keepdims=True)
    )
    for user in range(users):
        for j in range(2):
            label = (user + j) % 10
            count = int(props[label, user // int(users / 10), j])
            count += int(generator.integers(300, 601))
            if users <= 20:
                count *= 2
            if index[label] + count < sizes[label]:
                held[user, label] += count
                index[label] += count
    return held


@pytest.mark.parametrize("users", [10, 20, 50, 100])
@pytest.mark.parametrize("seed", range(5))
def test_ktpfl2_is_the_authors_generator(users, seed):
    sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # MNIST's
    labels = np.repeat(np.arange(10), sizes)
    counts = class_counts(dealt("ktpfl2", labels, users, seed), labels)
    np.testing.assert_array_equal(
        counts, reference_ktpfl2(sizes, users, np.random.default_rng(seed))
    )


def test_ktpfl2_leaves_a_third_of_60000_samples_to_nobody():
    """The authors' own script uses 43,080 on average (300 seeds), 41,696 with their seed 1."""
    wholes = [dealt("ktpfl2", LARGE, 20, seed) for seed in range(60)]
    assert np.mean([60000 - whole.dropped for whole in wholes]) == pytest.approx(43080, abs=1200)


def test_ktpfl2_gives_two_neighbouring_classes():
    for shard, row in enumerate(class_counts(dealt("ktpfl2", LARGE, 20), LARGE)):
        assert set(np.flatnonzero(row)) == {shard % 10, (shard + 1) % 10}


# --- natural ---


@st.composite
def owned(draw):
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=25))
    names = draw(
        st.lists(st.integers(-5, 500), min_size=len(sizes), max_size=len(sizes), unique=True)
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = generator.permutation(np.repeat(names, sizes))
    return owners, draw(st.integers(1, len(sizes)))


@given(owned())
def test_whole_owners_are_dealt_and_no_shard_is_much_larger(one):
    owners, shards = one
    whole = dealt("natural", np.zeros(len(owners), dtype=np.int64), shards, owners=owners)
    assert whole.dropped == 0
    holders = [set(owners[part]) for part in whole.parts]
    assert sum(len(held) for held in holders) == len(set(owners))
    # The largest first, each to the smallest shard: without its smallest owner none would be above any.
    sizes = dict(zip(*np.unique(owners, return_counts=True), strict=True))
    smallest = min(len(part) for part in whole.parts)
    for part, held in zip(whole.parts, holders, strict=True):
        assert len(part) - min(sizes[owner] for owner in held) <= smallest


@given(owned())
def test_natural_one_gives_one_of_the_largest_owners_to_each_shard(one):
    owners, shards = one
    whole = dealt("natural:1", np.zeros(len(owners), dtype=np.int64), shards, owners=owners)
    _, sizes = np.unique(owners, return_counts=True)
    kept = [owners[part[0]] for part in whole.parts]
    for part, owner in zip(whole.parts, kept, strict=True):
        np.testing.assert_array_equal(part, np.flatnonzero(owners == owner))
    assert sorted(len(part) for part in whole.parts) == sorted(sizes)[-shards:]
    assert whole.dropped == sum(sorted(sizes)[:-shards])
    assert kept == sorted(kept)


# --- share: Zhao et al. 2018 ---


@pytest.mark.parametrize("inner", ["iid", "dirichlet:0.5", "classes:2", "natural"])
def test_sharing_nothing_is_the_partition_itself(inner):
    owners = np.arange(1000) // 9
    plain = dealt(inner, SMALL, 10, owners=owners)
    assert digest(dealt(f"share:0+{inner}", SMALL, 10, owners=owners)) == digest(plain)
    assert digest(dealt(f"share:0,0.5+{inner}", SMALL, 10, owners=owners)) == digest(plain)


def test_everybody_gets_the_same_even_pool_and_so_sees_every_class():
    whole = dealt("share:0.05+classes:1", SMALL, 10)
    pool = whole.shared[0]
    assert np.bincount(SMALL[pool]).tolist() == [5] * 10
    assert all(np.array_equal(more, pool) for more in whole.shared)
    assert whole.dropped == 0 and sum(len(part) for part in whole.parts) == 950
    assert ((class_counts(whole, SMALL) > 0).sum(axis=1) == 1).all()


def test_the_pool_is_even_where_the_samples_are_not():
    labels = np.repeat(np.arange(3), [900, 60, 40])
    pool = dealt("share:0.1+iid", labels, 4).shared[0]
    assert sorted(np.bincount(labels[pool])) == [33, 33, 34]


def test_each_shard_gets_a_random_fraction_of_its_own():
    whole = dealt("share:0.2,0.3+iid", SMALL, 10)
    assert {len(more) for more in whole.shared} == {60}
    assert len({more.tobytes() for more in whole.shared}) == 10
    in_pool = np.unique(np.concatenate(whole.shared))
    assert len(in_pool) <= 200
    assert whole.dropped == 200 - len(in_pool)


def test_what_the_other_partition_drops_is_counted_and_owners_go_along():
    owners = np.repeat([7, 3, 9, 1], [400, 300, 200, 100])
    labels = np.tile(np.arange(10), 100)
    whole = dealt("share:0.1+natural:1", labels, 2, owners=owners)
    assert [set(owners[part]) for part in whole.parts] == [{3}, {7}]
    kept = sum(len(part) for part in whole.parts)
    assert whole.dropped == 1000 - kept - 100


def test_pools_may_be_shared_twice():
    whole = dealt("share:0.1+share:0.1+iid", SMALL, 5)
    assert {len(more) for more in whole.shared} == {100 + 90} and whole.dropped == 0


# --- what can't be ---


@pytest.mark.parametrize(
    ("spec", "shards", "words"),
    [
        ("quantity", 5, "positive number, as in quantity:0.5"),
        ("quantity:1,recut", 5, "takes min= after its number, not 'recut'"),
        ("quantity:0.001", 20, "take a larger alpha, fewer shards or a smaller min"),
        ("shards", 5, "whole number"),
        ("shards:0", 5, "take 1 to 200"),
        ("shards:201", 5, "take 1 to 200"),
        ("lecture", 10, "takes 1 or 2"),
        ("lecture:3", 10, "takes 1 or 2"),
        ("lecture:1", 9, "makes 10 shards, not 9: take --num-shards 10, or classes:1"),
        ("lecture:2", 20, "makes 10 shards, not 20: take --num-shards 10, or classes:2"),
        ("dominant", 5, "takes a share of 1, as in dominant:0.8"),
        ("dominant:0", 5, "takes a share of 1"),
        ("dominant:1.1", 5, "takes a share of 1"),
        ("dominant:nan", 5, "takes a share of 1"),
        ("dominant:0.8,min=3", 5, "takes one value"),
        (
            "dominant:0.8",
            100,
            r"smallest of 100 shards \d samples, fewer than 10: take fewer shards",
        ),
        ("heterofl", 10, "whole number"),
        ("heterofl:0", 10, "not possible with 10 classes"),
        ("heterofl:11", 10, "not possible with 10 classes"),
        ("heterofl:2", 12, "take a multiple of 5 as --num-shards"),
        ("heterofl:3", 12, "take a multiple of 10 as --num-shards"),
        ("heterofl:10", 101, "has 100 samples for 101 pieces"),
        ("ktpfl1:3", 5, "takes min=N or nothing, not '3'"),
        ("ktpfl1:", 5, "takes min=N or nothing, not ''"),
        ("ktpfl1:min=x", 5, "whole number above 0"),
        (
            "ktpfl1",
            20,
            "needs 200 samples of class 0, which has 100: take fewer shards or a smaller min",
        ),
        ("ktpfl2:3", 5, "no argument"),
        ("ktpfl2", 100, "needs 200 samples of class 0, which has 100"),
        ("natural:2", 5, "takes 1 or nothing"),
        ("natural", 5, "does not know them"),
        ("share:0.05", 5, r"as in share:0.05\+dirichlet:0.5"),
        ("share:0.05+", 5, r"as in share:0.05\+dirichlet:0.5"),
        ("share", 5, r"as in share:0.05\+dirichlet:0.5"),
        ("share:2+iid", 5, "takes a share of 1"),
        ("share:0.1,0+iid", 5, "takes a share of 1"),
        ("share:0.1,+iid", 5, "takes a share of 1"),
        ("share:0.005+iid", 5, "is 5, fewer than the 10 classes: share more"),
        ("share:1+iid", 5, "0 private samples can't be dealt into 5 shards"),
        ("share:0.1+nothing", 5, "There is no partition 'nothing'"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, shards, words):
    with pytest.raises(UsageError, match=words):
        dealt(spec, SMALL, shards)


def test_more_shards_than_owners_are_refused():
    with pytest.raises(UsageError, match="has 4 owners for 5 shards: take --num-shards 4 or less"):
        dealt("natural", SMALL, 5, owners=np.arange(1000) % 4)


def test_a_class_too_small_for_the_pool_is_named():
    with pytest.raises(UsageError, match="needs 50 samples of class 1, which has 20: share less"):
        dealt("share:0.1+iid", np.repeat([0, 1], [980, 20]), 4)


@pytest.mark.parametrize("spec", ["lecture:2", "ktpfl2", "dominant:0.8"])
def test_one_class_is_not_enough(spec):
    with pytest.raises(UsageError, match="two classes"):
        dealt(spec, np.zeros(100, dtype=np.int64), 1)


def test_a_class_of_one_sample_cannot_be_halved():
    with pytest.raises(UsageError, match="can't halve class 1: it has one sample"):
        dealt("lecture:2", np.array([0, 0, 1]), 2)
