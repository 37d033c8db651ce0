"""CIFAR: pickles as both Pythons write them, pickles that mean harm, and the real ones."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkit.data import cifar
from fedkit.data.datasets import open_dataset
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

ROOT = os.environ.get("FEDKIT_DATA_ROOT", "")


def rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def python2(fields):
    """The bytes that Python 2 wrote: its strings, and arrays whose bytes are one string."""

    def string(text):
        return b"T" + len(text).to_bytes(4, "little") + text

    def value(thing):
        if isinstance(thing, np.ndarray):
            shape = b"".join(b"J" + n.to_bytes(4, "little") for n in thing.shape)
            kind = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
            kind += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(
                b"b"
            )
            return (
                made
                + b"\x87R(K\x01"
                + shape
                + b"\x86"
                + kind
                + b"\x89"
                + string(thing.tobytes())
                + b"tb"
            )
        if isinstance(thing, list):
            return b"](" + b"".join(value(item) for item in thing) + b"e"
        return string(thing.encode()) if isinstance(thing, str) else b"K" + bytes([thing])

    items = b"".join(string(name.encode()) + value(thing) for name, thing in fields.items())
    return b"\x80\x02}(" + items + b"u."


def python3(fields, protocol=2):
    return pickle.dumps(fields, protocol=protocol)


def write(root, pickled=python2, sizes=(7, 5, 6, 4, 8, 9)):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    files = [*(name for name, _ in cifar.CIFAR10.train), "test_batch"]
    for number, (name, size) in enumerate(zip(files, sizes, strict=True)):
        labels = [(number + row) % 10 for row in range(size)]
        (folder / name).write_bytes(pickled({"labels": labels, "data": rows(size, number)}))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickled({"label_names": names}))
    return folder


def opened(root, name="cifar10"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return open_dataset(name, DataSettings(str(root), allow_checksum_mismatch=True))


@pytest.mark.parametrize("pickled", [python2, python3, lambda fields: python3(fields, 3)])
def test_batches_of_any_python_are_one_set_in_order(tmp_path, pickled):
    write(tmp_path, pickled)
    data = opened(tmp_path)
    expected = np.concatenate([rows(size, seed) for seed, size in enumerate((7, 5, 6, 4, 8))])
    assert np.array_equal(data.train.all().data.numpy().reshape(-1, 3072), expected)
    assert np.array_equal(data.test.all().data.numpy().reshape(-1, 3072), rows(9, 5))
    indices = torch.tensor([29, 0, 12, 7, 6, 12])
    taken = data.train.take(indices)
    assert np.array_equal(taken.data.numpy().reshape(-1, 3072), expected[indices.numpy()])
    assert torch.equal(taken.labels, data.train.labels[indices])
    assert data.classes == tuple(f"class {number}" for number in range(10))


def test_images_stay_in_the_mapped_file(tmp_path):
    folder = write(tmp_path)
    images, _ = cifar._batch(folder / "data_batch_1", "labels", 10)
    owner = images
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert not isinstance(owner.obj if isinstance(owner, memoryview) else owner, bytes)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
@pytest.mark.skipif(not ROOT, reason="FEDKIT_DATA_ROOT names no folder of real data sets")
def test_real_files_are_read_as_torchvision_reads_them(name, kind):
    from torchvision import datasets

    loader = type(kind, (getattr(datasets, kind),), {"_check_integrity": lambda self: True})
    if not (Path(ROOT) / loader.base_folder).is_dir():
        pytest.skip(f"the data root has no {kind}")
    ours = opened(ROOT, name)
    theirs = loader(ROOT, train=False)
    indices = torch.arange(0, len(theirs), 7)
    expected = torch.from_numpy(theirs.data).permute(0, 3, 1, 2)
    assert torch.equal(ours.test.take(indices).data, expected[indices])
    assert ours.test.labels.tolist() == theirs.targets
    assert ours.classes == tuple(theirs.classes) and len(ours.train) == 50000


@pytest.mark.skipif(
    not (Path(ROOT) / "cifar-100-python").is_dir() or not ROOT,
    reason="FEDKIT_DATA_ROOT names no folder with CIFAR-100",
)
def test_coarse_labels_group_the_fine_ones():
    fine, coarse = opened(ROOT, "cifar100"), opened(ROOT, "cifar100:coarse")
    assert len(coarse.classes) == 20 and coarse.name == "cifar100:coarse"
    pairs = set(zip(fine.train.labels.tolist(), coarse.train.labels.tolist(), strict=True))
    assert len(pairs) == 100  # each fine class in one group
    named = {fine.classes[one]: coarse.classes[other] for one, other in pairs}
    assert named["apple"] == "fruit_and_vegetables" and named["willow_tree"] == "trees"


def test_our_checksums_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    for ours, theirs in ((cifar.CIFAR10, CIFAR10), (cifar.CIFAR100, CIFAR100)):
        assert [list(pair) for pair in ours.train] == theirs.train_list
        assert [list(ours.test)] == theirs.test_list
        assert ours.meta == (theirs.meta["filename"], theirs.meta["md5"])
        assert ours.folder == theirs.base_folder


class Harm:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("harm", "asked"),
    [
        (Harm(os.system, "touch harmed"), "system"),
        (Harm(eval, "open('harmed', 'w')"), "eval"),
        (np.array([Harm(os.mkdir, "harmed")], dtype=object), "array that is not of bytes|mkdir"),
        (np.zeros(3), "array that is not of bytes"),
        (Harm(np.load, "harmed"), r"numpy\.load"),
    ],
)
def test_a_pickle_that_asks_for_anything_else_is_refused(tmp_path, monkeypatch, harm, asked):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path)
    path = folder / "data_batch_2"
    path.write_bytes(python3({"labels": [], "data": harm}))
    with pytest.raises(FedkitError, match=f"data_batch_2 can't be read .*({asked})"):
        opened(tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([], "holds no fields"),
        ({"data": rows(3)}, "has no data and labels"),
        ({"labels": [0, 1, 2], "data": b"123"}, "has no data and labels"),
        ({"labels": [0, 1], "data": rows(3)}, r"2 labels, and an array .*2 x 3072 was expected"),
        ({"labels": [0, 1, 10], "data": rows(3)}, "whole numbers from 0 to 9"),
        ({"labels": [0, True, 1], "data": rows(3)}, "whole numbers from 0 to 9"),
        ({"labels": [0, 1, 2], "data": rows(3)[:, :1024]}, "an array of 3,072 bytes"),
    ],
)
def test_a_file_that_is_no_batch_is_named(tmp_path, fields, sentence):
    path = write(tmp_path) / "test_batch"
    path.write_bytes(python3(fields))
    with pytest.raises(FedkitError, match=sentence) as caught:
        opened(tmp_path)
    assert str(path) in str(caught.value)


def test_columns_first_arrays_are_read_too(tmp_path):
    path = write(tmp_path) / "test_batch"
    path.write_bytes(python3({"labels": [1, 2, 3], "data": np.asfortranarray(rows(3))}))
    assert np.array_equal(opened(tmp_path).test.all().data.numpy().reshape(3, -1), rows(3))


def test_published_files_need_no_permission(tmp_path, monkeypatch):
    folder = write(tmp_path)

    def known(name):
        return name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    train = tuple(known(name) for name, _ in cifar.CIFAR10.train)
    family = replace(
        cifar.CIFAR10, train=train, test=known("test_batch"), meta=known("batches.meta")
    )
    monkeypatch.setattr(cifar, "CIFAR10", family)
    assert open_dataset("cifar10", DataSettings(str(tmp_path))).checksums == (
        "md5 of all 7 files as published"
    )


@pytest.mark.parametrize("spec", ["cifar10:coarse", "cifar100:fine", "cifar100:"])
def test_arguments_that_there_are_not_are_refused(spec):
    with pytest.raises(UsageError):
        open_dataset(spec, DataSettings())
