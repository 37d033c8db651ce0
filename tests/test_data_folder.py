"""Folders of pictures: layouts, what a picture becomes, and everything that is no picture."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fedkit import registry
from fedkit.data.datasets import open_dataset
from fedkit.data.samples import Form
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setattr(registry, "_allowed", set())


def picture(path, value=0, size=(6, 4), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path, **how)
    return path


def opened(root, options="", form=None):
    return open_dataset(f"folder:pictures{options}", DataSettings(str(root)), form)


def values(pool):
    return pool.all().data[:, 0, 0, 0].tolist()


@pytest.fixture
def home(tmp_path):
    """Ten cats of values 0 to 9, five dogs of 100 to 104."""
    for number in range(10):
        picture(tmp_path / "pictures" / "cat" / f"{number}.png", number)
    for number in range(5):
        picture(tmp_path / "pictures" / "dog" / f"{number}.png", 100 + number)
    return tmp_path / "pictures"


def test_each_folder_is_a_class_and_a_fifth_of_each_is_for_testing(home, tmp_path):
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog") and data.train.shape == (3, 4, 6)
    assert sorted(values(data.train) + values(data.test)) == [*range(10), *range(100, 105)]
    for pool, cats, dogs in ((data.train, 8, 4), (data.test, 2, 1)):
        assert torch.bincount(pool.labels).tolist() == [cats, dogs]
        assert [value >= 100 for value in values(pool)] == pool.labels.bool().tolist()
    assert values(opened(tmp_path).test) == values(data.test)


def test_a_new_class_does_not_move_the_pictures_of_another(home, tmp_path):
    before = values(opened(tmp_path).test)
    picture(home / "zebra" / "0.png", 200)
    assert values(opened(tmp_path).test) == before


@pytest.mark.parametrize("test", ["test", "val"])
def test_parts_that_are_there_are_kept(tmp_path, test):
    picture(tmp_path / "pictures" / "train" / "b" / "0.png", 1)
    picture(tmp_path / "pictures" / "train" / "a" / "deep" / "0.png", 2)
    picture(tmp_path / "pictures" / test / "c" / "0.png", 3)
    data = opened(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert (values(data.train), data.train.labels.tolist()) == ([2, 1], [0, 1])
    assert (values(data.test), data.test.labels.tolist()) == ([3], [2])


def test_pictures_without_classes_are_a_public_set(tmp_path):
    for number in (2, 1):
        picture(tmp_path / "pictures" / f"{number}.png", number)
    data = opened(tmp_path)
    assert data.classes == () and len(data.test) == 0
    assert values(data.train) == [1, 2] and data.train.labels.tolist() == [0, 0]


def test_an_empty_folder_is_a_class_without_samples(home, tmp_path):
    (home / "bird").mkdir()
    data = opened(tmp_path)
    assert data.classes == ("bird", "cat", "dog")
    assert torch.bincount(data.train.labels, minlength=3).tolist() == [0, 8, 4]


def test_nothing_but_pictures_inside_the_folder_is_opened(home, tmp_path):
    picture(tmp_path / "secret.png", 250)
    picture(tmp_path / "elsewhere" / "0.png", 251)
    (home / "cat" / "link.png").symlink_to(tmp_path / "secret.png")
    (home / "outside").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (home / "cat" / "round").symlink_to(home, target_is_directory=True)
    picture(home / "cat" / ".hidden.png", 252)
    picture(home / ".thumbnails" / "0.png", 253)
    (home / "cat" / "notes.txt").write_text("not a picture")
    picture(home / "loose.png", 254)
    os.mkfifo(home / "cat" / "pipe.png")
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog")
    assert max(values(data.train) + values(data.test)) == 104
    # The link out, the folder outside, the hidden ones, the text, the loose picture, the pipe.
    assert data.notes[0].startswith("7 passed over")


def test_sizes_are_made_alike_by_bilinear_resizing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a" / "0.png")
    picture(tmp_path / "pictures" / "a" / "1.png", 7)
    with pytest.raises(UsageError, match=r"0\.png has 10x20 .*1\.png 6x4: .*pictures,size=32"):
        opened(tmp_path)
    wanted = np.array(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR))
    for data in (opened(tmp_path, ",size=8"), opened(tmp_path, form=Form((3, 8, 8)))):
        found = data.train.all().data
        assert data.train.shape == (3, 8, 8) and found.dtype == torch.uint8
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize(("options", "form"), [(",grey", None), ("", Form((1, 4, 6)))])
def test_grey_is_one_channel_with_its_own_normalisation(home, tmp_path, options, form):
    data = opened(tmp_path, options, form)
    assert data.train.shape == (1, 4, 6)
    assert torch.allclose(data.train.mean / 255, torch.tensor([0.449]))
    assert torch.allclose(opened(tmp_path).train.std / 255, torch.tensor([0.229, 0.224, 0.225]))


@pytest.mark.parametrize("bits", [8, 16])
def test_pictures_stand_as_their_camera_held_them(tmp_path, bits):
    pixels = (np.arange(24, dtype=np.uint8) * 10).reshape(4, 6)
    stored = np.rot90(pixels)  # orientation 6: turn it clockwise to see it
    if bits == 16:
        stored = stored.astype(np.uint16) * 256 + 99
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "pictures" / "0.png", exif=exif)
    data = opened(tmp_path, ",grey")
    assert data.train.shape == (1, 4, 6)
    assert np.array_equal(data.train.all().data[0, 0].numpy(), pixels)


def test_transparency_is_dropped_and_palettes_are_colours(tmp_path):
    (tmp_path / "pictures").mkdir()
    clear = np.dstack([np.full((4, 6, 3), 80, dtype=np.uint8), np.zeros((4, 6), dtype=np.uint8)])
    Image.fromarray(clear).save(tmp_path / "pictures" / "0.png")
    Image.fromarray(np.full((4, 6, 3), 80, dtype=np.uint8)).quantize(2).save(
        tmp_path / "pictures" / "1.png"
    )
    assert values(opened(tmp_path).train) == [80, 80]


def truncated(path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def bomb(path):
    """A few bytes that say they are 40,000 x 40,000 pixels."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"GIF89a is what it is not"), "is no picture"),
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is no picture"),
        (truncated, "can't be read"),
        (bomb, "can't be read .*bomb"),
    ],
)
def test_a_broken_picture_is_named_when_it_is_taken(home, tmp_path, spoil, sentence):
    path = home / "dog" / "3.png"
    spoil(path)
    data = opened(tmp_path, ",size=8")
    with pytest.raises(FedkitError, match=sentence) as caught:
        data.train.all(), data.test.all()
    assert str(path) in str(caught.value)
    cats = torch.nonzero(data.train.labels == 0).flatten()
    assert len(data.train.take(cats)) == 8


def test_broken_pictures_do_not_hide_the_size_of_the_others(home, tmp_path):
    (home / "cat" / "0.png").write_bytes(b"")
    assert opened(tmp_path).train.shape == (3, 4, 6)
    for path in home.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(FedkitError, match="None of the 15 pictures can be read"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "options", [",size=0", ",size=x", ",size=4096", ",size=8,blue", ",grey,grey2", ",size="]
)
def test_options_that_there_are_not_are_refused(home, tmp_path, options):
    with pytest.raises(UsageError, match="folder takes"):
        opened(tmp_path, options)


@pytest.mark.parametrize("shape", [(7, 8, 8), (3, 10**6, 8)])
def test_a_strangers_form_that_no_picture_has_is_refused(home, tmp_path, shape):
    with pytest.raises(FedkitError, match="pictures can't be read as"):
        opened(tmp_path, form=Form(shape))


def test_a_folder_without_pictures_is_told(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FedkitError, match="holds no pictures"):
        opened(tmp_path)
    (tmp_path / "pictures").rmdir()
    (tmp_path / "pictures").write_text("a file")
    with pytest.raises(FedkitError, match="is no folder"):
        opened(tmp_path)


def test_a_path_may_have_commas(tmp_path):
    picture(tmp_path / "a, b,c" / "x" / "0.png", 5)
    data = open_dataset("folder:a, b,c,size=4", DataSettings(str(tmp_path)))
    assert values(data.train) == [5]
