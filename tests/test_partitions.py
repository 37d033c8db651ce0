"""Partitions: the contract that all keep, and what iid, dirichlet and classes promise (algorithms.md 9)."""

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.data.partitions import Dealt, Labelled, deal, dealing, digest
from fedkit.data.partitions.dealing import MIN_SHARD
from fedkit.errors import FedkitError, UsageError
from fedkit.registry import names

SPECS = ["iid", "dirichlet:0.5", "dirichlet:100", "classes:2", "classes:10"]
SPECS += [
    "dirichlet:0.5,recut",
    "dirichlet-min:0.1",
    "dirichlet-client:1",
    "quantity:1",
    "shards:2",
]
SPECS += ["natural", "share:0+classes:2"]
DROPPING = ["natural:1", "heterofl:2", "ktpfl1", "ktpfl2", "dominant:0.8", "lecture:1", "lecture:2"]
DROPPING += ["share:0.1+iid", "share:0.1,0.3+dirichlet:1"]
if find_spec("flwr_datasets"):
    DROPPING += ["flwr:LinearPartitioner"]
LARGE = np.repeat(np.arange(10), 5000)
SMALL = np.repeat(np.arange(10), 100)


def dealt(spec, labels, shards, seed=1, owners=None):
    return deal(spec, Labelled(labels, owners), shards, np.random.default_rng(seed)).parts


def shares(part, labels):
    counts = np.bincount(labels[part], minlength=int(labels.max()) + 1)
    return counts / counts.sum()


def median_top_share(spec, seed):
    return np.median([shares(part, LARGE).max() for part in dealt(spec, LARGE, 20, seed)])


def assert_keeps_contract(whole, count, shards):
    assert len(whole.parts) == len(whole.shared) == shards
    for array in [*whole.parts, *whole.shared]:
        assert array.dtype == np.int64 and array.ndim == 1
        assert (np.diff(array) > 0).all()
    assert all(len(part) for part in whole.parts)
    parts, shared = set(), set()
    for part in whole.parts:
        assert parts.isdisjoint(part.tolist())
        parts |= set(part.tolist())
    for more in whole.shared:
        shared |= set(more.tolist())
    assert parts.isdisjoint(shared)
    assert parts | shared <= set(range(count))
    assert whole.dropped == count - len(parts) - len(shared)


def assert_complete(parts, labels, shards):
    assert_keeps_contract(
        Dealt(parts, [np.empty(0, dtype=np.int64)] * shards, 0), len(labels), shards
    )


def test_these_are_all_partitions():
    assert set(names("partitions")) == {
        "classes", "dirichlet", "dirichlet-client", "dirichlet-min", "dominant", "flwr", "heterofl",
        "iid", "ktpfl1", "ktpfl2", "lecture", "natural", "quantity", "share", "shards",
    }  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shards", [1, 5, 8, 20])
@pytest.mark.parametrize("seed", [1, 2])
def test_shards_are_sorted_disjoint_and_complete(spec, shards, seed):
    labels = np.random.default_rng(seed).permutation(SMALL)
    if "classes:2" in spec and shards == 1:
        pytest.skip("one shard can't hold ten classes and two")
    samples = Labelled(labels, np.arange(1000) // 7)
    whole = deal(spec, samples, shards, np.random.default_rng(seed))
    assert_keeps_contract(whole, len(labels), shards)
    assert whole.dropped == 0


@st.composite
def deals(draw):
    spec = draw(st.sampled_from([*SPECS, *DROPPING]))
    count, kinds = draw(st.integers(1, 2500)), draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    even = draw(st.booleans())
    weights = np.ones(kinds) / kinds if even else generator.dirichlet(np.ones(kinds))
    labels = generator.choice(kinds, size=count, p=weights) + draw(st.sampled_from([0, 30]))
    samples = Labelled(labels, generator.integers(draw(st.integers(1, 60)), size=count))
    shards = draw(st.one_of(st.integers(1, 40), st.just(kinds), st.integers(1, 4)))
    return spec, samples, shards, generator


@settings(max_examples=250)
@given(deals())
def test_any_deal_keeps_the_contract_or_says_in_a_sentence_why_not(one):
    spec, samples, shards, generator = one
    try:
        whole = deal(spec, samples, shards, generator)
    except UsageError as refusal:
        assert str(refusal).endswith(".")
    else:
        assert_keeps_contract(whole, len(samples), shards)


@pytest.mark.parametrize("spec", [*SPECS, *DROPPING])
def test_the_same_seed_deals_the_same(spec):
    samples = Labelled(np.repeat(np.arange(10), 400), np.arange(4000) // 99)
    first, second, third = (
        digest(deal(spec, samples, 10, np.random.default_rng(seed))) for seed in (1, 1, 2)
    )
    assert first == second
    # The data's own partition and whole classes leave nothing to chance.
    assert (first == third) == (spec in ("natural", "natural:1", "lecture:1"))


@pytest.mark.parametrize("spec", [*SPECS, *DROPPING])
def test_labels_are_not_written_to(spec):
    labels = np.repeat(np.arange(10), 400)
    labels.flags.writeable = False
    owners = np.arange(4000) // 99
    owners.flags.writeable = False
    deal(spec, Labelled(labels, owners), 10, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("spec", "shards", "expected"),
    [
        ("iid", 8, "f9e972a9316c4a4735511834e86dac3cb9d2ad2cdb646937e16c4e1dda8c3336"),
        ("dirichlet:0.5", 20, "56260aa54c7b2fc4148b03e5a769be547244f7deee6008c121ca2d87646996ee"),
        ("dirichlet:0.1", 8, "6bbd10fac474aeb42ea107f63b9d069920da38286230d457e8f7f4f02aa508cc"),
        ("classes:2", 8, "0e19b7ef32bdd56651d58df83ca966e0f2052f1ef4b1cce41ea4302fde6174c3"),
        ("classes:5", 20, "9b87b871dc7d3e319433f497e113e20398caa616573b797060240a40e4b46568"),
    ],
)
def test_the_indices_of_a_seed_never_change(spec, shards, expected):
    """Runs and documented numbers hang on them: digests of fedkit's first commits."""
    assert digest(deal(spec, Labelled(LARGE), shards, np.random.default_rng(1))) == expected


def plug_in(monkeypatch, result):
    def partition(samples, shards, argument, generator):
        return result(samples) if callable(result) else result

    monkeypatch.setattr(dealing, "find", lambda kind, spec: (partition, None))


FIRST, SECOND = np.array([0, 1]), np.array([2, 4])


def test_a_plug_in_is_dealt_by_like_ours(monkeypatch):
    plug_in(monkeypatch, [FIRST, SECOND])
    whole = deal("mine", Labelled(np.zeros(5, dtype=np.int64)), 2, np.random.default_rng(1))
    assert whole.parts[1] is SECOND and whole.dropped == 1


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "no list of parts for 2 shards"),
        ([FIRST], "1 parts for 2 shards"),
        ([FIRST, np.array([], dtype=np.int64)], "shard 1 is empty"),
        ([FIRST, np.array([4, 2])], "parts of shard 1 are not sorted"),
        ([FIRST, np.array([2, 2])], "parts of shard 1 are not sorted"),
        ([FIRST, np.array([2, 5])], "not sorted indices below 5"),
        ([FIRST, np.array([-1, 2])], "not sorted indices below 5"),
        ([FIRST, [2, 4]], "no array of int64"),
        ([FIRST, np.array([2.0, 4.0])], "no array of int64"),
        ([FIRST, np.array([[2, 4]])], "no array of int64"),
        ([FIRST, np.array([1, 4])], "sample 1 is dealt twice"),
        (Dealt([FIRST, SECOND], [FIRST], 0), "1 shared samples for 2 shards"),
        (Dealt([FIRST, SECOND], [np.array([3]), np.array([4])], 0), "sample 4 is dealt twice"),
        (Dealt([FIRST, SECOND], [np.array([3]), np.array([7])], 0), "shared samples of shard 1"),
    ],
)
def test_a_plug_ins_result_that_is_no_partition_is_refused(monkeypatch, result, words):
    plug_in(monkeypatch, result)
    with pytest.raises(UsageError, match=f"The partition mine is none: .*{words}"):
        deal("mine", Labelled(np.zeros(5, dtype=np.int64)), 2, np.random.default_rng(1))


def test_a_plug_in_that_fails_is_named(monkeypatch):
    plug_in(monkeypatch, lambda samples: 1 // 0)
    with pytest.raises(
        FedkitError, match=r"The partition mine failed with ZeroDivisionError: .*zero"
    ):
        deal("mine", Labelled(np.zeros(5, dtype=np.int64)), 2, np.random.default_rng(1))


@given(st.integers(1, 200), st.data(), st.integers(0, 2**32 - 1))
def test_iid_shards_differ_by_one_at_most(count, data, seed):
    shards = data.draw(st.integers(1, count))
    parts = dealt("iid", np.zeros(count, dtype=np.int64), shards, seed)
    assert_complete(parts, np.zeros(count), shards)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_iid_is_shuffled():
    assert all(len(set(LARGE[part])) == 10 for part in dealt("iid", LARGE, 20))


@pytest.mark.parametrize("law", ["dirichlet", "dirichlet-min"])
@pytest.mark.parametrize("seed", range(5))
def test_a_huge_alpha_deals_like_the_whole(law, seed):
    labels = np.repeat(np.arange(10), np.arange(1, 11) * 1000)
    for part in dealt(f"{law}:1e6", labels, 20, seed):
        np.testing.assert_allclose(shares(part, labels), np.arange(1, 11) / 55, atol=0.005)


@pytest.mark.parametrize("law", ["dirichlet", "dirichlet-min"])
@pytest.mark.parametrize("seed", range(5))
def test_small_alphas_skew_as_calibrated(law, seed):
    assert 0.5 <= median_top_share(f"{law}:0.1", seed) <= 0.9
    assert 0.2 <= median_top_share(f"{law}:1", seed) <= 0.4


def test_recutting_softens_the_skew_and_makes_sizes_equal():
    """algorithms.md 9.2: neighbours then share a boundary class."""
    seeds = range(20)
    plain = np.mean([median_top_share("dirichlet:0.1", seed) for seed in seeds])
    recut = np.mean([median_top_share("dirichlet:0.1,recut", seed) for seed in seeds])
    assert recut < plain - 0.03
    assert {len(part) for part in dealt("dirichlet:0.1,recut", LARGE, 20)} == {2500}


def test_recutting_keeps_the_order_of_the_shards():
    """Shard k of the recut is the k-th equal piece of the shards laid end to end."""
    plain, recut = dealt("dirichlet:0.1", LARGE, 10), dealt("dirichlet:0.1,recut", LARGE, 10)
    ends = np.cumsum([len(part) for part in plain])
    owner = np.empty(len(LARGE), dtype=np.int64)
    for shard, part in enumerate(plain):
        owner[part] = shard
    for shard, part in enumerate(recut):
        first, last = shard * 5000, (shard + 1) * 5000 - 1
        expected = range(
            int(np.searchsorted(ends, first, "right")),
            int(np.searchsorted(ends, last, "right")) + 1,
        )
        assert set(owner[part]) == set(expected)


@pytest.mark.parametrize(("alpha", "shards"), [("0.01", 20), ("0.05", 100), ("1e-9", 100)])
def test_minima_first_deals_where_dirichlet_cannot(alpha, shards):
    labels = np.repeat(np.arange(10), 140)
    parts = dealt(f"dirichlet-min:{alpha}", labels, shards)
    assert_complete(parts, labels, shards)
    assert min(len(part) for part in parts) >= MIN_SHARD


def test_minima_may_use_up_every_sample():
    parts = dealt("dirichlet-min:0.1,min=50", SMALL, 20)
    assert {len(part) for part in parts} == {50}


@pytest.mark.parametrize("law", ["dirichlet:1", "dirichlet-min:0.3", "quantity:2"])
def test_the_smallest_shard_has_as_many_samples_as_min_says(law):
    assert min(len(part) for part in dealt(f"{law},min=60", SMALL, 8)) >= 60
    assert (
        min(len(part) for seed in range(5) for part in dealt(f"{law},min=1", SMALL, 50, seed)) < 10
    )


def test_client_wise_shards_are_equal_and_drawn_from_their_own_shares():
    """Dir(alpha x prior): E q = prior, Var q_c = p(1-p)/(alpha+1), for all but the last shards."""
    labels = np.repeat(np.arange(4), [800, 600, 400, 200])
    prior, first = np.array([0.4, 0.3, 0.2, 0.1]), []
    for seed in range(400):
        parts = dealt("dirichlet-client:1", labels, 10, seed)
        assert {len(part) for part in parts} == {200}
        first.append(shares(parts[0], labels))
    # 400 draws of a standard deviation of at most 0.35: means within 4 standard errors.
    np.testing.assert_allclose(np.mean(first, axis=0), prior, atol=0.07)
    expected = prior * (1 - prior) / 2
    np.testing.assert_allclose(np.var(first, axis=0), expected, rtol=0.25)


def test_a_large_client_wise_alpha_deals_like_the_whole():
    # The last shards take what chance has left over.
    for part in dealt("dirichlet-client:1e6", LARGE, 20)[:10]:
        np.testing.assert_allclose(shares(part, LARGE), 0.1, atol=5 * np.sqrt(0.09 / 2500))


@pytest.mark.parametrize("seed", range(5))
def test_no_dirichlet_shard_is_tiny(seed):
    assert min(len(part) for part in dealt("dirichlet:0.1", SMALL, 8, seed)) >= MIN_SHARD == 10


@pytest.mark.parametrize("law", ["dirichlet", "dirichlet-min", "dirichlet-client"])
@pytest.mark.parametrize("alpha", ["1e-3", "1e-300"])
def test_shares_that_underflow_are_dealt_all_the_same(law, alpha):
    assert_complete(dealt(f"{law}:{alpha}", SMALL, 3), SMALL, 3)


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
    with pytest.raises(
        UsageError, match=r"take a larger alpha or fewer shards, or dirichlet-min:"
    ) as refusal:
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
    parts = deal(f"classes:{held}", Labelled(labels), shards, generator).parts
    assert_complete(parts, labels, shards)
    assert {len(set(labels[part])) for part in parts} == {held}


@given(card_games())
def test_every_class_is_held_by_equally_many(game):
    labels, held, shards, generator = game
    parts = deal(f"classes:{held}", Labelled(labels), shards, generator).parts
    holders = [sum(kind in labels[part] for part in parts) for kind in np.unique(labels)]
    assert sum(holders) == held * shards
    assert max(holders) - min(holders) <= 1


@given(card_games())
def test_a_class_is_cut_equally_among_its_holders(game):
    labels, held, shards, generator = game
    parts = deal(f"classes:{held}", Labelled(labels), shards, generator).parts
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
        ("dirichlet:0.5,min", 5, r"min= and recut after its number, not 'min'"),
        ("dirichlet:0.5,min=0", 5, "above 0, not '0'"),
        ("dirichlet:0.5,min=-1", 5, "above 0, not '-1'"),
        ("dirichlet:0.5,least=3", 5, "min= and recut"),
        ("dirichlet:0.5,recut=yes", 5, "min= and recut"),
        ("dirichlet-min:0.5,recut", 5, "takes min= after its number, not 'recut'"),
        ("dirichlet:0.5,min=300", 5, "no 5 shards of 300 samples or more: take 3 shards or fewer"),
        ("dirichlet-min:0.5,min=300", 5, "take 3 shards or fewer, or a smaller min"),
        ("dirichlet-client", 5, "positive number"),
        ("dirichlet-client:1,min=3", 5, "takes one value"),
        ("dirichlet-client:0", 5, "positive number"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, shards, words):
    with pytest.raises(UsageError, match=words):
        dealt(spec, SMALL, shards)


def test_digest_depends_on_who_holds_what():
    nothing = np.array([], dtype=np.int64)
    parts = [np.array([0, 1]), np.array([2, 3])]
    others = [
        [parts[1], parts[0]],
        [np.array([0]), np.array([1, 2, 3])],
        [np.array([0, 1, 2, 3])],
        [*parts, nothing],
        [np.array([0, 1]), np.array([2, 4])],
        [*parts, np.array([5]), np.array([5])],
    ]
    plain = [Dealt(some, [nothing] * len(some), 0) for some in [parts, *others]]
    shared = [
        Dealt(parts, [np.array([5]), np.array([5])], 0),
        Dealt(parts, [np.array([5]), nothing], 0),
        Dealt(parts, [nothing, np.array([5])], 0),
    ]
    assert len({digest(whole) for whole in [*plain, *shared]}) == 10
    assert digest(Dealt(parts, [], 3)) == digest(plain[0])
