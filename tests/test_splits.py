"""Who holds what: public set, common test set and shards of digits (splits.py)."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkit.data import splits
from fedkit.data.datasets import open_dataset
from fedkit.data.public import PublicSet
from fedkit.data.samples import DataSet, Pool, Samples, pool_of
from fedkit.data.splits import cut
from fedkit.errors import UsageError
from fedkit.settings import DataSettings, FederationSettings

SOURCES = DataSettings()
SETTINGS = FederationSettings(partition="iid", num_shards=4)
POOL, TEST, PUBLIC = 1400, 397, 400


def cut_as(**changes):
    return cut(replace(SETTINGS, **changes), SOURCES)


def pictures(samples):
    """How often each image is there; no two of digits' 1,797 are alike."""
    samples = samples.all() if isinstance(samples, Pool) else samples
    return Counter(image.tobytes() for image in samples.data.numpy())


def parts_of(data, number):
    shard = data.shard(number)
    return [shard.train, shard.val, shard.test]


def sizes_of(data, number):
    return [len(part) for part in parts_of(data, number)]


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "classes:3"])
@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_public_test_and_private_are_disjoint_and_complete(partition, val_fraction):
    data = cut_as(partition=partition, val_fraction=val_fraction)
    whole = pictures(data.dataset.train) + pictures(data.dataset.test)
    assert sum(whole.values()) == len(whole) == 1797
    held = pictures(data.public) + pictures(data.dataset.test)
    for number in range(4):
        for part in parts_of(data, number):
            held += pictures(part)
    assert held == whole


def test_the_common_test_set_is_the_same_for_every_seed():
    first, second = cut_as(seed=1), cut_as(seed=2)
    assert len(first.dataset.test) == TEST
    torch.testing.assert_close(first.dataset.test.all().data, second.dataset.test.all().data)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3"])
def test_a_quarter_of_a_shard_only_measures(partition):
    data = cut_as(partition=partition)
    for number, shard in enumerate(data.dealt.parts):
        train, val, test = sizes_of(data, number)
        assert test == round(0.25 * len(shard))
        assert (train, val) == (len(shard) - test, 0)


def test_own_test_data_have_the_shards_own_classes():
    data = cut_as(partition="classes:2", num_shards=5)
    for number in range(5):
        shard = data.shard(number)
        assert set(shard.test.labels.tolist()) == set(shard.train.labels.tolist())


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_validation_data_are_taken_from_training_data(fraction):
    plain, held_out = cut_as(), cut_as(val_fraction=fraction)
    for number in range(4):
        train, _, test = sizes_of(plain, number)
        val = round(train * fraction)
        assert sizes_of(held_out, number) == [train - val, val, test]
        # The test data stay what they are, so that the two can be compared.
        assert pictures(held_out.shard(number).test) == pictures(plain.shard(number).test)
    assert held_out.partition_digest == plain.partition_digest


def test_a_shard_of_one_sample_measures_and_does_not_train():
    data = cut_as(public="digits:1396")
    assert [sizes_of(data, number) for number in range(4)] == [[0, 0, 1]] * 4


@pytest.mark.parametrize("number", [-1, 4, 100])
def test_there_is_no_shard_beyond_the_last(number):
    with pytest.raises(UsageError, match=f"no shard {number}: .* 4, numbered 0 to 3"):
        cut_as().shard(number)


def test_labels_stay_with_their_images():
    data = cut_as()
    train = data.dataset.train.all()
    label_of = {
        image.tobytes(): label
        for image, label in zip(train.data.numpy(), train.labels.tolist(), strict=True)
    }
    for part in [data.public, *parts_of(data, 0)]:
        for image, label in zip(part.data.numpy(), part.labels.tolist(), strict=True):
            assert label_of[image.tobytes()] == label


@pytest.mark.parametrize("public", ["auto", "digits:400"])
def test_digits_lend_400_images_by_default(public):
    data = cut_as(public=public)
    assert data.settings.public == "digits:400"
    assert len(data.public) == PUBLIC
    assert sum(len(shard) for shard in data.dealt.parts) == POOL - PUBLIC


@pytest.mark.parametrize("count", [1, 100, 1396])
def test_the_public_set_has_the_size_that_was_asked_for(count):
    data = cut_as(public=f"digits:{count}")
    assert len(data.public) == count
    assert sum(len(shard) for shard in data.dealt.parts) == POOL - count


@pytest.mark.parametrize("count", [0, -1, POOL, POOL + 1])
def test_other_public_sizes_are_refused(count):
    with pytest.raises(UsageError, match=f"digits has {POOL} training samples"):
        cut_as(public=f"digits:{count}")


def test_a_part_of_the_private_data_is_named_with_its_count():
    with pytest.raises(UsageError, match="NAME:COUNT"):
        cut_as(public="digits")


@pytest.mark.parametrize("public", ["digits:", "digits:many", "digits:1.5", "400", "letter:5"])
def test_another_word_is_no_public_set(public):
    with pytest.raises(UsageError):
        cut_as(public=public)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_public_images_are_in_no_shard(seed):
    data = cut_as(seed=seed, partition="dirichlet:0.5")
    public = pictures(data.public)
    for shard in data.dealt.parts:
        assert not public & pictures(data.dataset.train.take(torch.from_numpy(shard)))


def test_equal_settings_cut_equally():
    first, second = cut_as(partition="dirichlet:0.3"), cut_as(partition="dirichlet:0.3")
    assert first.public_digest == second.public_digest
    assert first.partition_digest == second.partition_digest
    for number in range(4):
        for mine, other in zip(parts_of(first, number), parts_of(second, number), strict=True):
            torch.testing.assert_close(mine.data, other.data)


def test_another_seed_cuts_otherwise():
    first, second = cut_as(seed=1), cut_as(seed=2)
    assert first.public_digest != second.public_digest
    assert first.partition_digest != second.partition_digest


@pytest.mark.parametrize("changes", [{"partition": "dirichlet:1"}, {"num_shards": 5}])
def test_another_partition_keeps_the_public_set(changes):
    first, second = cut_as(), cut_as(**changes)
    assert first.public_digest == second.public_digest
    assert first.partition_digest != second.partition_digest


def test_labels_are_part_of_the_public_set_only_where_they_are_used():
    unlabelled, labelled = cut_as(), cut_as(public_labels=True)
    assert unlabelled.public_digest != labelled.public_digest
    assert unlabelled.partition_digest == labelled.partition_digest


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"strategy": "fedmd"},
        {"rounds": 3, "codec": "float16", "model": "cnn", "alone": True, "select": "uniform:0.5"},
    ],
)
def test_a_shard_is_the_same_whatever_the_strategy(changes):
    first, second = cut_as(strategy="ktpfl"), cut_as(**changes)
    assert first.public_digest == second.public_digest
    assert first.partition_digest == second.partition_digest
    for number in range(4):
        for mine, other in zip(parts_of(first, number), parts_of(second, number), strict=True):
            torch.testing.assert_close(mine.data, other.data)


def digest_of(name, indices, samples):
    return PublicSet(name, indices, samples).digest()


def test_the_public_digest_depends_on_content():
    images = torch.arange(64, dtype=torch.uint8).reshape(4, 1, 4, 4)
    public = Samples(images, torch.zeros(4, dtype=torch.int64), torch.ones(1), torch.ones(1))
    indices = np.array([3, 5, 8, 9])
    changed = images.clone()
    changed[2, 0, 1, 1] += 1
    digests = {
        digest_of("digits", indices, public),
        digest_of("mnist", indices, public),
        digest_of("digits", indices + 1, public),
        digest_of("digits", indices[::-1], public),
        digest_of("digits", indices, replace(public, data=changed)),
        digest_of("digits", indices, replace(public, data=images.flip(0))),
        digest_of("digits", indices, replace(public, mean=torch.zeros(1))),
        digest_of("digits", indices, replace(public, std=torch.full((1,), 2.0))),
    }
    assert len(digests) == 8
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


def test_the_public_digest_knows_no_labels():
    """They are not used, so a set that came without any is the same set."""
    data = cut_as()
    unlabelled = replace(data.public, labels=torch.zeros_like(data.public.labels))
    chosen = np.arange(PUBLIC)
    assert digest_of("digits", chosen, unlabelled) == digest_of("digits", chosen, data.public)


# A public set that is not the private data set's own.


@pytest.fixture
def letters(monkeypatch):
    """A second data set beside digits, 26 classes of noise, in whatever shape is asked for."""

    def add(shape=(1, 8, 8), count=60):
        generator = torch.Generator().manual_seed(5)
        images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
        one = torch.ones(shape[0])
        pool = pool_of(images, torch.arange(count) % 26, one, one)
        other = DataSet("letters", pool, pool, tuple("abcdefghijklmnopqrstuvwxyz"))
        monkeypatch.setattr(
            splits,
            "open_dataset",
            lambda name, sources, form=None: (
                other if name == "letters" else open_dataset(name, sources, form)
            ),
        )

    return add


@pytest.mark.parametrize("count", [20, 60])
def test_another_public_set_takes_nothing_from_the_clients(letters, count):
    letters()
    data = cut_as(public=f"letters:{count}")
    assert len(data.public) == count
    assert sum(len(shard) for shard in data.dealt.parts) == POOL
    assert data.outputs == 10


def test_another_public_set_cannot_give_more_than_it_has(letters):
    letters()
    with pytest.raises(UsageError, match="letters has 60 training samples"):
        cut_as(public="letters:61")


@pytest.mark.parametrize("shape", [(1, 9, 8), (3, 8, 8)])
def test_a_public_set_of_another_image_size_is_refused(letters, shape):
    letters(shape)
    with pytest.raises(UsageError, match="one network can't read both"):
        cut_as(public="letters:20")


def test_public_labels_add_the_public_sets_classes(letters):
    letters()
    assert cut_as(public="letters:60", public_labels=True).outputs == 36
    assert cut_as(public="digits:60", public_labels=True).outputs == 10


def test_private_classes_come_after_the_labelled_public_sets(letters):
    """As FedMD's code numbers them: C = public plus private classes, private labels offset."""
    letters()
    plain = cut_as(public="letters:60")
    data = cut_as(public="letters:60", public_labels=True)
    assert data.classes == (*"abcdefghijklmnopqrstuvwxyz", *(str(digit) for digit in range(10)))
    assert data.public.labels.tolist() == [label % 26 for label in range(60)]
    for number in range(4):
        for mine, other in zip(parts_of(data, number), parts_of(plain, number), strict=True):
            assert torch.equal(mine.data, other.data)
            assert torch.equal(mine.labels, other.labels + 26)
    assert torch.equal(data.dataset.test.labels, plain.dataset.test.labels + 26)
    assert data.agreement.first_private == 26
    assert data.agreement.private_classes == plain.classes


def test_a_public_set_without_a_count_is_the_whole_other_set(letters):
    letters()
    assert len(cut_as(public="letters").public) == 60


def test_shared_samples_train_everybody_and_measure_nobody():
    data = cut_as(partition="share:0.1+classes:2", num_shards=5, val_fraction=0.2)
    shared = pictures(data.dataset.train.take(torch.from_numpy(data.dealt.shared[0])))
    assert len(shared) == 100
    for number in range(5):
        train, val, test = parts_of(data, number)
        assert not shared - pictures(train)
        assert not shared & pictures(val) and not shared & pictures(test)
        assert set(train.labels.tolist()) == set(range(10))
        assert len(set(test.labels.tolist())) == 2


def test_only_private_training_is_augmented():
    data = cut_as(augment="flip")
    shard = data.shard(0)
    assert shard.train.augment is not None
    assert shard.val.augment is shard.test.augment is data.public.augment is None
    plain = cut_as().shard(0).train
    rows = slice(0, 64)
    assert torch.equal(shard.train.inputs(rows), plain.inputs(rows))
    torch.manual_seed(3)
    changed = shard.train.training_inputs(rows)
    mirrored = changed.flip(3)
    same = (changed == plain.inputs(rows)).flatten(1).all(1)
    assert (same | (mirrored == plain.inputs(rows)).flatten(1).all(1)).all()
    assert 10 < int(same.sum()) < 54
