"""Augmentation: what comes out are the same pictures, moved as promised, and the same for a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkit.data.augment import augmentation, crop, flip, rotate
from fedkit.errors import UsageError


def pictures(count=64, channels=3, height=9, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, channels, height, width), generator=generator)


def test_flip_mirrors_about_half_of_the_images_and_does_nothing_else():
    images = pictures(2000)
    torch.manual_seed(3)
    flipped = flip(images.clone())
    kept = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    assert (kept ^ mirrored).all()
    # Five standard deviations of 2,000 tosses are 112.
    assert abs(int(mirrored.sum()) - 1000) < 112


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(3, 8), st.integers(3, 8), st.integers(1, 2)
)
def test_crop_is_a_window_of_the_padded_image(count, channels, height, width, padding):
    images = pictures(count, channels, height, width)
    torch.manual_seed(5)
    cropped = crop(images, padding).numpy()
    torch.manual_seed(5)
    tops, lefts = torch.randint(2 * padding + 1, (2, count)).tolist()
    for image, found, top, left in zip(images.numpy(), cropped, tops, lefts, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        assert np.array_equal(found, padded[:, top : top + height, left : left + width])


def test_crop_reaches_every_offset_about_equally_often():
    images = torch.zeros((5000, 1, 5, 5))
    images[:, 0, 2, 2] = 1
    torch.manual_seed(1)
    where = crop(images, 2).flatten(1).argmax(dim=1)
    counts = torch.bincount(where, minlength=25)
    # 200 of each are expected; five standard deviations are 70.
    assert len(counts) == 25 and (counts - 200).abs().max() < 70


def test_rotation_by_nothing_changes_nothing():
    images = pictures()
    assert torch.allclose(rotate(images, 0), images, atol=1e-4)


def oracle_rotation(image, angle):
    """Each output pixel looked up where the turn takes it from: bilinear, zeros outside, float64."""
    _, height, width = image.shape
    result = np.zeros(image.shape)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, row - (height - 1) / 2
            from_x = math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2
            from_y = math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2
            left, top = math.floor(from_x), math.floor(from_y)
            for at_y, at_x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= at_y < height and 0 <= at_x < width:
                    share = (1 - abs(from_y - at_y)) * (1 - abs(from_x - at_x))
                    result[:, row, column] += share * image[:, at_y, at_x]
    return result


def test_rotation_turns_oblong_images_as_a_slow_look_up_does():
    images = pictures(4, 2, 6, 9)
    torch.manual_seed(9)
    turned = rotate(images, 30)
    torch.manual_seed(9)
    angles = (2 * torch.rand(4).double() - 1) * math.pi * 30 / 180
    assert angles.abs().min() > 0.01
    for image, found, angle in zip(images.double().numpy(), turned, angles.tolist(), strict=True):
        assert np.allclose(found.numpy(), oracle_rotation(image, angle), atol=1e-4)


@pytest.mark.parametrize("spec", ["flip", "crop", "crop:2", "rotate:15", "flip,crop:3,rotate:10"])
def test_the_same_seed_gives_the_same_pictures(spec):
    images = pictures()
    made = augmentation(spec, (3, 9, 7))

    def augment(inputs):
        return made(inputs.clone())  # it may change them in place

    torch.manual_seed(11)
    first, second = augment(images), augment(images)
    torch.manual_seed(11)
    assert torch.equal(augment(images), first) and torch.equal(augment(images), second)
    assert not torch.equal(first, second)
    assert first.shape == images.shape and first.dtype == images.dtype


def test_none_is_none_and_draws_nothing():
    assert augmentation("none", (80,)) is None


def test_steps_are_taken_in_the_order_in_which_they_are_named():
    images = pictures()
    torch.manual_seed(2)
    expected = flip(crop(images, 4))
    torch.manual_seed(2)
    assert torch.equal(augmentation("crop, flip", (3, 9, 7))(images), expected)


def test_the_default_padding_is_four_and_never_a_whole_tiny_image():
    images = pictures(8, 1, 8, 8)
    torch.manual_seed(2)
    expected = crop(images, 4)
    torch.manual_seed(2)
    assert torch.equal(augmentation("crop", (1, 8, 8))(images), expected)
    assert augmentation("crop", (1, 3, 3))(torch.ones(9, 1, 3, 3)).flatten(1).sum(dim=1).min() >= 1


@pytest.mark.parametrize(
    "spec",
    [
        *("", "flop", "flip:2", "flip,", "flip,none", "none:1"),
        *("crop:0", "crop:x", "crop:9", "crop:-1"),
        *("rotate", "rotate:nan", "rotate:181", "rotate:-1", "rotate:x"),
    ],
)
def test_nonsense_is_refused(spec):
    with pytest.raises(UsageError):
        augmentation(spec, (3, 9, 7))


def test_what_is_no_image_is_not_augmented():
    with pytest.raises(UsageError, match="for images"):
        augmentation("flip", (80,))
