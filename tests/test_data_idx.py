"""The MNIST family: files of that format, right and damaged, and the real ones against torchvision."""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkit.data import idx
from fedkit.data.datasets import open_dataset
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

ROOT = os.environ.get("FEDKIT_DATA_ROOT", "")
FOREIGN = {"allow_checksum_mismatch": True}


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write(root, family, train, test):
    """Four files of a family; ``train`` and ``test`` are pairs of images and labels."""
    folder = root / family.kind / "raw"
    folder.mkdir(parents=True)
    for name, array in zip(family.files, [*train, *test], strict=True):
        (folder / name).write_bytes(idx_bytes(array))
    return folder


def labelled(count, first=0, classes=10, seed=0):
    labels = (np.arange(count) % classes + first).astype(np.uint8)
    return images(count, seed), labels


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.skipif(not ROOT, reason="FEDKIT_DATA_ROOT names no folder of real data sets")
def test_real_files_are_read_as_torchvision_reads_them(name, kind):
    from torchvision import datasets

    if not (Path(ROOT) / kind).is_dir():
        pytest.skip(f"the data root has no {kind}")
    ours = open_dataset(name, DataSettings(ROOT))
    for pool, is_train in ((ours.train, True), (ours.test, False)):
        theirs = getattr(datasets, kind)(ROOT, train=is_train)
        indices = torch.arange(0, len(theirs), 7)
        assert torch.equal(pool.take(indices).data[:, 0], theirs.data[indices])
        assert torch.equal(pool.labels, theirs.targets)
        assert ours.classes == tuple(theirs.classes)


@pytest.mark.parametrize("part", ["balanced", "letters"])
def test_emnist_is_put_upright_and_counts_from_nought(tmp_path, part):
    family = idx.EMNIST[part]
    train = labelled(150, family.first_label, len(family.classes))
    test = labelled(60, family.first_label, len(family.classes), seed=1)
    write(tmp_path, family, train, test)
    data = open_dataset(f"emnist:{part}", DataSettings(str(tmp_path)))
    assert np.array_equal(data.train.all().data[:, 0].numpy(), train[0].transpose(0, 2, 1))
    assert np.array_equal(data.test.labels.numpy(), test[1].astype(int) - family.first_label)
    assert data.train.labels.dtype == torch.int64 and data.name == f"emnist:{part}"


def test_emnist_names_its_classes_as_torchvision_does():
    from torchvision.datasets import EMNIST

    assert idx.EMNIST["balanced"].classes == tuple(EMNIST.classes_split_dict["balanced"])
    assert ("N/A", *idx.EMNIST["letters"].classes) == tuple(EMNIST.classes_split_dict["letters"])
    assert [len(idx.EMNIST[part].classes) for part in ("balanced", "letters")] == [47, 26]


def test_only_the_samples_that_are_asked_for_are_given_in_that_order(tmp_path):
    train = labelled(30)
    write(tmp_path, idx.MNIST, train, labelled(10))
    with pytest.warns(UserWarning):
        data = open_dataset("mnist", DataSettings(str(tmp_path), **FOREIGN))
    taken = data.train.take(torch.tensor([29, 3, 3]))
    assert np.array_equal(taken.data[:, 0].numpy(), train[0][[29, 3, 3]])
    assert taken.labels.tolist() == [9, 3, 3]
    assert data.train.take(torch.empty(0, dtype=torch.int64)).shape == (1, 28, 28)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Files that are the published ones, as far as the table knows, and their contents."""
    arrays = [*labelled(30), *labelled(10, seed=1)]
    folder = write(tmp_path, idx.MNIST, arrays[:2], arrays[2:])

    def md5(content):
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    known = []
    for name in idx.MNIST.files:
        content = (folder / name).read_bytes()
        packed = gzip.compress(content, mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
        known.append((md5(content), md5(packed)))
    monkeypatch.setattr(idx, "MNIST", replace(idx.MNIST, md5=tuple(known)))
    return folder


def test_packed_files_do_as_well(published, tmp_path):
    plain = open_dataset("mnist", DataSettings(str(tmp_path)))
    expected = plain.train.all().data
    for name in idx.MNIST.files:
        (published / name).unlink()
    packed = open_dataset("mnist", DataSettings(str(tmp_path)))
    assert torch.equal(packed.train.all().data, expected)
    assert packed.files[0].name.endswith(".gz") and "published" in packed.checksums
    (published / f"{idx.MNIST.files[0]}.gz").write_bytes(b"something else")
    with pytest.raises(FedkitError, match=r"images-idx3-ubyte\.gz has the md5"):
        open_dataset("mnist", DataSettings(str(tmp_path)))
    with pytest.warns(UserWarning), pytest.raises(FedkitError, match="is damaged"):
        open_dataset("mnist", DataSettings(str(tmp_path), **FOREIGN))


@pytest.mark.parametrize("file", range(4))
def test_one_other_byte_is_noticed(published, tmp_path, file):
    path = published / idx.MNIST.files[file]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FedkitError, match=f"{path.name} has the md5 .*get the original"):
        open_dataset("mnist", DataSettings(str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (0, b"", "is no idx file"),
        (0, b"\x00\x00\x08\x01\x00\x00\x00\x00", "is no idx file of 3 dimensions"),
        (0, idx_bytes(images(5))[:-1], "is damaged: it has 3,935 bytes and should have 3,936"),
        (0, idx_bytes(np.zeros((5, 8, 8), dtype=np.uint8)), "holds images of 8x8, not 28x28"),
        (1, idx_bytes(np.array([1, 2], dtype=np.uint8)), "2 labels for the 5 images"),
        (1, idx_bytes(np.array([1, 2, 3, 4, 10], dtype=np.uint8)), "labels from 1 to 10; 0 to 9"),
        (3, idx_bytes(np.zeros((0,), dtype=np.uint8)), "0 labels for the 3 images"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, sentence):
    folder = write(tmp_path, idx.MNIST, labelled(5), labelled(3))
    path = folder / idx.MNIST.files[file]
    path.write_bytes(content)
    with pytest.warns(UserWarning), pytest.raises(FedkitError, match=sentence) as caught:
        open_dataset("mnist", DataSettings(str(tmp_path), **FOREIGN))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("spec", ["emnist", "emnist:byclass", "mnist:3", "fashion-mnist:"])
def test_arguments_that_there_are_not_are_refused(tmp_path, spec):
    with pytest.raises(UsageError):
        open_dataset(spec, DataSettings(str(tmp_path)))


def test_missing_emnist_says_how_to_get_the_right_part(tmp_path):
    with pytest.raises(FedkitError, match=r"EMNIST/raw; .*split='letters', download=True"):
        open_dataset("emnist:letters", DataSettings(str(tmp_path)))
