"""Data sets and models as they come from outside: real files where they are, made-up ones elsewhere."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedkit.data.datasets import open_dataset
from fedkit.errors import FedkitError
from fedkit.models.build import build_model, parameter_count
from fedkit.registry import load, names
from fedkit.settings import DataSettings

ROOT = os.environ.get("FEDKIT_DATA_ROOT", "")
real = pytest.mark.skipif(not ROOT, reason="FEDKIT_DATA_ROOT names no folder of real data sets")


@real
@pytest.mark.parametrize(
    ("name", "folder", "sizes", "shape"),
    [
        ("mnist", "MNIST", (60000, 10000), (1, 28, 28)),
        ("fashion-mnist", "FashionMNIST", (60000, 10000), (1, 28, 28)),
        ("cifar10", "cifar-10-batches-py", (50000, 10000), (3, 32, 32)),
    ],
)
def test_real_data_sets_are_read_and_normalised(name, folder, sizes, shape):
    if not (Path(ROOT) / folder).is_dir():
        pytest.skip(f"{ROOT} has no {folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = open_dataset(name, DataSettings(ROOT, allow_checksum_mismatch=True))
    assert (len(data.train), len(data.test)) == sizes
    assert data.train.shape == shape and len(data.classes) == 10
    inputs = data.train.take(torch.arange(0, 50000, 5)).inputs(slice(None))
    assert inputs.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


def test_digits_are_normalised_and_complete():
    data = open_dataset("digits", DataSettings())
    assert (len(data.train), len(data.test)) == (1400, 397)
    inputs = torch.cat([pool.all().inputs(slice(None)) for pool in (data.train, data.test)])
    assert abs(float(inputs.mean())) < 1e-3 and abs(float(inputs.std()) - 1) < 1e-3


def test_a_foreign_cifar_file_is_refused_until_it_is_allowed(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    with pytest.raises(FedkitError, match=r"has no file .*data_batch_1"):
        open_dataset("cifar10", DataSettings(str(tmp_path)))
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(b"something else")
    (folder / "test_batch").write_bytes(b"something else")
    with pytest.raises(FedkitError, match="--allow-checksum-mismatch"):
        open_dataset("cifar10", DataSettings(str(tmp_path)))
    with pytest.warns(UserWarning, match="not the published file"), pytest.raises(FedkitError):
        open_dataset("cifar10", DataSettings(str(tmp_path), allow_checksum_mismatch=True))


def test_a_missing_root_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    with pytest.raises(FedkitError, match="give --data-root FOLDER"):
        open_dataset("mnist", DataSettings())
    with pytest.raises(FedkitError, match=r"expected in .*MNIST/raw.*download=True"):
        open_dataset("mnist", DataSettings(str(tmp_path)))


@pytest.mark.parametrize("name", names("datasets"))
def test_every_data_set_is_described_in_a_line(name):
    text = inspect.getdoc(load("datasets", name))
    line = text.partition("\n")[0]
    assert line.endswith(".") and len(line) < 110


def test_no_reader_imports_torchvision(tmp_path):
    # It takes a second and 60 MB, on devices that may have neither.
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0.png")
    code = """
import sys
from fedkit.data.datasets import open_dataset
from fedkit.errors import FedkitError
from fedkit.registry import load, names
from fedkit.settings import DataSettings
opened = set()
for name in [*names("datasets"), "synthetic:1,1", "folder:pictures"]:
    try:
        opened.add(open_dataset(name, DataSettings(sys.argv[1])).name)
    except FedkitError:
        pass  # its files are not here
assert {"digits", "synthetic:1,1", "folder:pictures"} <= opened, opened
assert "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_initial_weights_hang_on_seed_and_client_alone():
    torch.manual_seed(5)
    first = build_model("lenet", (1, 8, 8), 10, seed=1, client=2).state_dict()
    torch.manual_seed(6)
    again = build_model("lenet", (1, 8, 8), 10, seed=1, client=2).state_dict()
    other = build_model("lenet", (1, 8, 8), 10, seed=1, client=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model("lenet", (1, 8, 8), 10, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_torchvisions_resnet18_keeps_its_size():
    # torchvision's 11,689,512 parameters and 9,620 buffers; other stem, other head.
    model = build_model("resnet18", (3, 32, 32), 1000, seed=1)
    assert parameter_count(model) == 11_689_512 + 9_620 - 3 * 64 * 49 + 3 * 64 * 9
