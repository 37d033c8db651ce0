"""Beside flwr-datasets: any of its partitioners, and whose indices are equal to ours for one generator."""

import sys

import numpy as np
import pytest

pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")

from datasets import Dataset
from flwr_datasets import partitioner as theirs

from fedkit.data.partitions import Labelled, deal
from fedkit.errors import UsageError

LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(10), 100))
OWNERS = np.random.default_rng(4).integers(17, size=1000)
SEED = 7
DISTRIBUTION = (
    "DistributionPartitioner,distribution_array=[[0.5,0.5],[0.4,0.6]],"
    "num_unique_labels_per_partition=2,preassigned_num_samples_per_label=5"
)


def ours(spec, shards, labels=LABELS):
    owners = OWNERS if len(labels) == 1000 else None
    return deal(spec, Labelled(labels, owners), shards, np.random.default_rng(SEED)).parts


def their_parts(partitioner, *, shuffle=False, labels=LABELS):
    columns = {"index": np.arange(len(labels)), "label": labels, "owner": OWNERS[: len(labels)]}
    dataset = Dataset.from_dict(columns)
    partitioner.dataset = dataset.shuffle(seed=SEED) if shuffle else dataset
    count = partitioner.num_partitions
    return [np.sort(np.array(partitioner.load_partition(i)["index"])) for i in range(count)]


def are_equal(mine, others):
    return len(mine) == len(others) and all(map(np.array_equal, mine, others))


def test_iid_equals_theirs_in_a_shuffled_data_set_only():
    mine = ours("iid", 7)
    assert are_equal(mine, their_parts(theirs.IidPartitioner(7), shuffle=True))
    assert not are_equal(mine, their_parts(theirs.IidPartitioner(7)))


@pytest.mark.parametrize("each", [1, 2, 5])
def test_shards_equal_theirs_where_the_pieces_are_even(each):
    options = {"partition_by": "label", "num_shards_per_partition": each, "seed": SEED}
    assert are_equal(
        ours(f"shards:{each}", 20), their_parts(theirs.ShardPartitioner(20, **options))
    )


def test_where_the_pieces_are_uneven_theirs_drop_the_remainder():
    options = {"partition_by": "label", "num_shards_per_partition": 2, "seed": SEED}
    their = their_parts(theirs.ShardPartitioner(7, **options))
    mine = ours("shards:2", 7)
    assert sum(map(len, mine)) == 1000 and sum(map(len, their)) == 14 * (1000 // 14)


@pytest.mark.parametrize("spec", ["natural", "natural:1"])
def test_natural_equals_theirs_with_as_many_shards_as_owners(spec):
    their = their_parts(theirs.NaturalIdPartitioner(partition_by="owner"))
    assert are_equal(ours(spec, 17), their)
    assert not are_equal(ours(spec, 16), their)


@pytest.mark.parametrize("balancing", [False, True])
def test_dirichlet_is_not_theirs_to_the_index(balancing):
    options = {"partition_by": "label", "alpha": 0.5, "self_balancing": balancing, "seed": SEED}
    assert not are_equal(
        ours("dirichlet:0.5", 5), their_parts(theirs.DirichletPartitioner(5, **options))
    )


@pytest.mark.parametrize("mode", ["random", "deterministic", "first-deterministic"])
def test_classes_are_not_theirs_to_the_index(mode):
    options = {"num_classes_per_partition": 2, "class_assignment_mode": mode, "seed": SEED}
    their = their_parts(theirs.PathologicalPartitioner(10, partition_by="label", **options))
    assert not are_equal(ours("classes:2", 10), their)


@pytest.mark.parametrize(
    ("spec", "shards"),
    [
        ("ContinuousPartitioner,strictness=0.5", 5),
        ("DirichletPartitioner,alpha=0.5,min_partition_size=10", 5),
        ("DirichletPartitioner,alpha=[0.5,1,2],self_balancing=true", 3),
        (DISTRIBUTION, 2),
        ("ExponentialPartitioner", 4),
        ("GroupedNaturalIdPartitioner,group_size=4", 5),
        ("IidPartitioner", 5),
        ("InnerDirichletPartitioner,partition_sizes=[300,200,100],alpha=0.5", 3),
        ("LinearPartitioner", 5),
        ("NaturalIdPartitioner", 17),
        (
            "PathologicalPartitioner,num_classes_per_partition=2,class_assignment_mode=deterministic",
            10,
        ),
        ("ShardPartitioner,num_shards_per_partition=2", 10),
        ("SizePartitioner,partition_sizes=[500,300]", 2),
        ("SquarePartitioner", 5),
    ],
)
def test_any_of_their_partitioners_deals(spec, shards, capfd):
    labels = np.repeat([0, 1], [60, 40]) if spec.startswith("Distribution") else LABELS
    first, second = ours(f"flwr:{spec}", shards, labels), ours(f"flwr:{spec}", shards, labels)
    assert len(first) == shards and are_equal(first, second)
    assert capfd.readouterr().err == ""


def test_the_seed_may_be_given_but_samples_are_shuffled_first():
    options = {"partition_by": "label", "alpha": 0.5, "seed": 3}
    order = np.random.default_rng(SEED)
    order.integers(2**32)
    order = order.permutation(1000)
    partitioner = theirs.DirichletPartitioner(5, **options)
    partitioner.dataset = Dataset.from_dict({"index": order, "label": LABELS[order]})
    expected = [np.sort(partitioner.load_partition(i)["index"]) for i in range(5)]
    assert are_equal(ours("flwr:DirichletPartitioner,alpha=0.5,seed=3", 5), expected)


@pytest.mark.parametrize(
    ("spec", "shards", "words"),
    [
        ("flwr", 5, "no partitioner ''"),
        ("flwr:Dirichlet", 5, r"no partitioner 'Dirichlet' \(did you mean .*DirichletPartitioner"),
        ("flwr:Partitioner", 5, "no partitioner 'Partitioner'"),
        ("flwr:VerticalEvenPartitioner", 5, "no partitioner 'VerticalEvenPartitioner'"),
        ("flwr:IidPartitioner,alpha=1", 5, "takes no 'alpha'"),
        ("flwr:DirichletPartitioner,alfa=1", 5, r"takes no 'alfa' \(did you mean alpha"),
        ("flwr:DirichletPartitioner,0.5", 5, "takes KEY=VALUE, as in alpha=0.5, not '0.5'"),
        ("flwr:DirichletPartitioner", 5, "can't deal 1000 samples into 5 shards .*alpha"),
        ("flwr:DirichletPartitioner,alpha=-1", 5, "can't deal 1000 samples into 5 shards"),
        ("flwr:DirichletPartitioner,alpha=0.001", 200, "max number of attempts"),
        ("flwr:PathologicalPartitioner,num_classes_per_partition=11", 5, "can't deal 1000 samples"),
        ("flwr:NaturalIdPartitioner", 5, "makes 17 shards here: take --num-shards 17"),
        ("flwr:IdToSizeFncPartitioner,partition_id_to_size_fn=3", 5, "can't deal 1000 samples"),
    ],
)
def test_what_they_cannot_do_is_a_sentence(spec, shards, words):
    with pytest.raises(UsageError, match=words):
        ours(spec, shards)


def test_owners_are_needed_where_they_deal_by_them():
    with pytest.raises(UsageError, match="this data set does not know them"):
        deal("flwr:NaturalIdPartitioner", Labelled(LABELS), 5, np.random.default_rng(1))


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(
        UsageError, match="needs the package flwr-datasets: `pip install flwr-datasets`"
    ):
        ours("flwr:IidPartitioner", 5)
