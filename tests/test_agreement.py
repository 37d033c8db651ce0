"""What a federation's outputs mean on every device, and the public set that travels to one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkit.data import public as public_sets
from fedkit.data.agreement import Agreement, fitted, read_agreement
from fedkit.data.public import PublicSet, received
from fedkit.data.samples import DataSet, pool_of
from fedkit.errors import FedkitError

AGREED = Agreement(
    shape=(1, 4, 4),
    classes=("p", "q", "cat", "dog", "fox"),
    first_private=2,
    columns=(),
    mean=(10.0,),
    std=(2.0,),
    public_digest="ab" * 32,
)


def data_set(classes, count=12, shape=(1, 4, 4), columns=()):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % max(len(classes), 1)
    pool = pool_of(images, labels, torch.zeros(1), torch.ones(1))
    return DataSet("folder:mine", pool, pool, tuple(classes), tuple(columns))


@given(st.permutations(["cat", "dog", "fox"]), st.integers(1, 3))
def test_column_3_means_the_same_on_devices_that_sort_or_lack_classes(names, kept):
    names = names[:kept]
    own = data_set(names)
    data = fitted(own, AGREED)
    for pool, before in ((data.train, own.train), (data.test, own.test)):
        meant = [AGREED.classes[label] for label in pool.labels.tolist()]
        assert meant == [names[label] for label in before.labels.tolist()]
    assert data.classes == ("cat", "dog", "fox")


def test_own_data_are_normalised_as_the_federations():
    taken = fitted(data_set(["dog"]), AGREED).train.take(torch.tensor([3]))
    expected = (taken.data.double() - 10) / 2
    torch.testing.assert_close(taken.inputs(slice(None)).double(), expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ["cat", "wolf", "Dog"]}, r"classes 'wolf', 'Dog'.*'cat', 'dog', 'fox'"),
        ({"classes": ["cat", "wolf"]}, r"has none of 'dog', 'fox'"),
        ({"classes": ["p", "cat"]}, "classes 'p'"),
        ({"classes": []}, "has no classes"),
        ({"classes": ["cat"], "shape": (3, 4, 4)}, "4x4 with 3 channels.*4x4 with 1 channel"),
        ({"classes": ["cat"], "columns": ["age"]}, "has the columns 'age'.*none"),
    ],
)
def test_what_differs_is_named(changes, sentence):
    with pytest.raises(FedkitError, match=sentence):
        fitted(data_set(**changes), AGREED)


def test_an_agreement_survives_the_message():
    assert read_agreement(AGREED.as_json()) == AGREED


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"shape": 3}'])
def test_another_text_is_no_agreement(text):
    with pytest.raises(ValueError, match="federation"):
        read_agreement(text)


@pytest.mark.parametrize(
    "lie",
    [
        *({"classes": []}, {"classes": ["p", "q", "cat", "cat"]}, {"first_private": 5}),
        *({"shape": [3, 16]}, {"shape": []}, {"shape": [0, 4, 4]}, {"shape": [1, 10**5, 10**5]}),
        *({"std": [0.0]}, {"std": [-1.0]}, {"mean": [float("nan")]}, {"mean": [1.0, 2.0]}),
        *({"mean": [], "std": []}, {"std": [float("inf")]}),
    ],
)
def test_nonsense_is_no_agreement(lie):
    with pytest.raises(ValueError, match="federation"):
        read_agreement(json.dumps({**json.loads(AGREED.as_json()), **lie}))


# The public set, as it travels to a device that lacks it.


def public_set(labels=False):
    own = data_set(["cat", "dog"])
    samples = own.train.take(torch.tensor([1, 4, 5]))
    public = PublicSet("mnist", np.array([1, 4, 5]), samples, ("p", "q"))
    return public, replace(AGREED, public_digest=public.digest(labels=labels))


@pytest.mark.parametrize("labels", [False, True])
def test_a_public_set_arrives_as_it_was(tmp_path, labels):
    public, agreed = public_set(labels)
    arrays = public.arrays(labels=labels)
    back = received("mnist", arrays, agreed, labels=labels)
    public_sets.keep(arrays, tmp_path / "new", agreed)
    kept = public_sets.kept("mnist", tmp_path / "new", agreed, labels=labels)
    assert kept is not None
    for one in (back, kept):
        assert torch.equal(one.samples.data, public.samples.data)
        assert one.digest(labels=labels) == agreed.public_digest
        assert one.classes == (("p", "q") if labels else ())
    if labels:
        assert torch.equal(back.samples.labels, public.samples.labels)


def test_labels_that_nobody_uses_do_not_travel():
    public, _ = public_set()
    assert public.samples.labels.any()
    assert not public.arrays(labels=False)["labels"].any()


def changed(arrays, **parts):
    return {**arrays, **parts}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "std"}, "a public set has"),
        (lambda a: changed(a, data=a["data"][:, :, :2]), "its samples are"),
        (lambda a: changed(a, data=a["data"].astype(object)), "its samples are"),
        (lambda a: changed(a, data=np.zeros((), np.uint8)), "its samples are"),
        (lambda a: changed(a, labels=a["labels"][:1]), "its labels are"),
        (lambda a: changed(a, labels=a["labels"] + 9), "none of the federation's classes"),
        (lambda a: changed(a, labels=a["labels"] - 9), "none of the federation's classes"),
        (lambda a: changed(a, indices=a["indices"].astype(np.int32)), "its indices are"),
        (lambda a: changed(a, mean=a["mean"].astype(np.float64)), "its mean is"),
        (lambda a: changed(a, data=a["data"] + 1), "its digest is not"),
        (lambda a: changed(a, mean=a["mean"] + 1), "its digest is not"),
    ],
)
def test_another_public_set_is_refused(change, sentence):
    public, agreed = public_set()
    with pytest.raises(ValueError, match=sentence):
        received("mnist", change(dict(public.arrays(labels=False))), agreed, labels=False)


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    public, agreed = public_set()
    public_sets.keep(public.arrays(labels=False), tmp_path, agreed)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert public_sets.kept("mnist", tmp_path, agreed, labels=False) is None
        assert not file.exists()


def test_only_the_newest_sets_are_kept(tmp_path):
    for seed in range(12):
        own = data_set(["cat", "dog"])
        samples = replace(own.train.all(), mean=torch.tensor([float(seed)]))
        public = PublicSet("mnist", np.arange(12), samples)
        agreed = replace(AGREED, public_digest=public.digest())
        public_sets.keep(public.arrays(labels=False), tmp_path, agreed)
        assert public_sets.kept("mnist", tmp_path, agreed, labels=False) is not None
    assert len(list(tmp_path.iterdir())) == 8


def test_a_digest_that_is_a_path_names_no_file(tmp_path):
    public, agreed = public_set()
    for digest in ("../../etc/passwd", "", "a/b", "a" * 65):
        with pytest.raises(FedkitError, match="no plain word"):
            public_sets.keep(
                public.arrays(labels=False), tmp_path, replace(agreed, public_digest=digest)
            )
    assert not list(tmp_path.iterdir())
