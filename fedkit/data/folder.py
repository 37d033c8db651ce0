"""Pictures in folders, one folder a class, as torchvision's ImageFolder has them.

Names are read when the data set is opened, pictures when they are taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedkit.data.found import Found
from fedkit.data.places import own_path
from fedkit.data.samples import Form, Pool
from fedkit.errors import FedkitError, UsageError
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"}
TRAIN, TESTS = "train", ("test", "val")
LARGEST = 1024
# ImageNet's, so that devices agree without a pass over anybody's pictures.
RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.449,), (0.226,)
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class Picture:
    """Where one is, and the class that its folder says; 0 without classes."""

    path: Path
    label: int = 0


@dataclass(frozen=True)
class Look:
    """What becomes of a picture: its channels, height and width; None: as it is stored."""

    channels: int
    size: tuple[int, int] | None


def folder(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """Pictures: folder:PATH[,size=S][,grey] with PATH/CLASS/PICTURE; without classes, a public set.

    PATH may hold ``train`` and ``test`` (or ``val``) with the classes in them; else a fixed fifth of
    each class is the test set, the same for every seed. Pictures are turned as their EXIF data say and
    resized to S x S (bilinear, not cropped), or as the federation's networks read them; without either
    all must have one size. Colours are RGB, transparency is dropped. Normalised by ImageNet's mean and
    standard deviation (``grey``: 0.449 and 0.226).
    """
    spec = f"folder:{argument or ''}"
    path, look = _parse(spec, argument or "", form)
    home = own_path(spec, path, sources)
    if not home.is_dir():
        raise FedkitError(f"{home} is no folder of pictures.")
    train, test, classes, notes = _listed(home)
    if not train and not test:
        raise FedkitError(
            f"{home} holds no pictures: they are expected in {home}/CLASS/, and end in "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    height, width = look.size or _common_size(spec, train + test)
    shape = (look.channels, height, width)
    return Found(
        spec,
        _pool(train, shape),
        _pool(test, shape),
        classes,
        files=(home,),
        notes=notes,
    )


def normalisation(channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pictures, each channel, in units of a byte."""
    mean, std = RGB if channels == 3 else GREY
    return torch.tensor(mean) * 255, torch.tensor(std) * 255


def _parse(spec: str, argument: str, form: Form | None) -> tuple[str, Look]:
    shape = form.shape if form is not None and len(form.shape) == 3 else None
    channels, size = (shape[0], shape[1:]) if shape else (3, None)
    if channels not in (1, 3) or (size and max(size) > LARGEST):
        raise FedkitError(
            f"{spec}: pictures can't be read as {channels} channels of {size} pixels."
        )
    path, *options = argument.split(",")
    while options and not _is_option(options[0]):
        path = f"{path},{options.pop(0)}"
    for option in options:
        name, _, value = option.partition("=")
        if option == "grey":
            channels = 1
        elif name == "size" and value.isdecimal() and 0 < int(value) <= LARGEST:
            size = (int(value), int(value))
        else:
            raise UsageError(
                f"{spec}: folder takes ,size=S (1 to {LARGEST} pixels) and ,grey after the path, not "
                f"{option!r}."
            )
    return path, Look(channels, (size[0], size[1]) if size else None)


def _is_option(text: str) -> bool:
    return text == "grey" or text.startswith("size=")


class _Scan:
    """A look through a folder that counts what it passes over."""

    def __init__(self, home: Path) -> None:
        self.inside = home.resolve()
        self.passed = 0

    def entries(self, place: Path) -> Iterator[os.DirEntry[str]]:
        """What is in a folder, by name; nothing hidden, and no link that leads out."""
        try:
            found = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise FedkitError(f"{place} can't be read: {error.strerror or error}.") from error
        for entry in found:
            if entry.name.startswith(".") or (entry.is_symlink() and self._leads_out(entry.path)):
                self.passed += 1
            else:
                yield entry

    def _leads_out(self, path: str) -> bool:
        try:
            return not Path(path).resolve(strict=True).is_relative_to(self.inside)
        except (OSError, RuntimeError):  # to nowhere, or round in a circle
            return True

    def folders(self, place: Path) -> list[Path]:
        """The folders in a folder."""
        passed = self.passed
        found = [Path(entry.path) for entry in self.entries(place) if entry.is_dir()]
        self.passed = passed  # `pictures` counts them
        return found

    def pictures(self, place: Path, *, deep: bool) -> list[Path]:
        """The pictures in a folder, and in the folders in it."""
        found, places = list[Path](), [place]
        while places:
            within = []
            for entry in self.entries(places.pop()):
                if entry.is_dir():
                    if deep and not entry.is_symlink():  # which might lead round in a circle
                        within.append(Path(entry.path))
                elif entry.is_file() and Path(entry.name).suffix.lower() in SUFFIXES:
                    found.append(Path(entry.path))
                else:
                    self.passed += 1
            places += reversed(within)
        return sorted(found)


def _listed(home: Path) -> tuple[list[Picture], list[Picture], tuple[str, ...], tuple[str, ...]]:
    """Training and test pictures, the classes, and what was passed over."""
    scan = _Scan(home)
    folders = {path.name: path for path in scan.folders(home)}
    loose = scan.pictures(home, deep=False)
    if not folders:
        return [Picture(path) for path in loose], [], (), _notes(scan.passed)
    tests = [folders[name] for name in TESTS if name in folders]
    parts = [folders[TRAIN], tests[0]] if TRAIN in folders and tests else [home]
    by_class = [{path.name: path for path in scan.folders(part)} for part in parts]
    classes = tuple(sorted({name for part in by_class for name in part}))
    found = [
        [
            Picture(path, label)
            for label, name in enumerate(classes)
            if name in part
            for path in scan.pictures(part[name], deep=True)
        ]
        for part in by_class
    ]
    if len(parts) == 1:
        found = _cut(found[0], len(classes))
    else:
        loose += [path for part in parts for path in scan.pictures(part, deep=False)]
        loose += [path for path in folders.values() if path not in parts]
    return found[0], found[1], classes, _notes(scan.passed + len(loose))


def _cut(pictures: list[Picture], classes: int) -> list[list[Picture]]:
    """A fixed fifth of each class apart."""
    train, test = list[Picture](), list[Picture]()
    for label in range(classes):
        of_class = [picture for picture in pictures if picture.label == label]
        order = numpy_generator(0, "folder test split", client=label).permutation(len(of_class))
        apart = set(order[: round(len(of_class) / 5)].tolist())
        for number, picture in enumerate(of_class):
            (test if number in apart else train).append(picture)
    return [train, test]


def _notes(passed: int) -> tuple[str, ...]:
    if not passed:
        return ()
    return (
        f"{passed} passed over: hidden, no picture, no class's, or a link that leads elsewhere",
    )


def _common_size(spec: str, pictures: list[Picture]) -> tuple[int, int]:
    """The size (height, width) of all; broken ones are told when they are taken."""
    first: tuple[Path, int, int] | None = None
    for picture in pictures:
        try:
            with _opened(picture.path) as image:
                width, height = image.size
                if image.getexif().get(ORIENTATION) in TURNED:
                    width, height = height, width
        except FedkitError:
            continue
        if first is None:
            first = picture.path, height, width
        elif first[1:] != (height, width):
            raise UsageError(
                f"{first[0]} has {first[2]}x{first[1]} pixels and {picture.path} {width}x{height}: say "
                f"which size all shall have, as in {spec},size=32."
            )
    if first is None:
        raise FedkitError(
            f"None of the {len(pictures)} pictures can be read: {pictures[0].path} is the first."
        )
    if max(first[1:]) > LARGEST:
        raise UsageError(
            f"{first[0]} has {first[2]}x{first[1]} pixels: say which size all shall have, as in "
            f"{spec},size=32."
        )
    return first[1:]


def _pool(pictures: list[Picture], shape: tuple[int, int, int]) -> Pool:
    def read(indices: Tensor) -> Tensor:
        data = torch.empty((len(indices), *shape), dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            data[row] = _decode(pictures[index].path, shape)
        return data

    labels = torch.tensor([picture.label for picture in pictures], dtype=torch.int64)
    return Pool(labels, read, shape, *normalisation(shape[0]))


def _decode(path: Path, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    with _opened(path) as image:
        turned = ImageOps.exif_transpose(_eight_bits(path, image))
        coloured = turned.convert("RGB" if channels == 3 else "L")
        resized = coloured.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(resized).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise FedkitError(f"{path} has pixels that are no whole numbers: store it with 8 bits.")
    if not image.mode.startswith("I"):
        return image
    # Pillow would cut off what is above 255.
    exif = image.getexif()
    upper = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    upper.getexif().update(exif)
    return upper


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture, only by the formats named above, and of a size that memory can hold."""
    try:
        with warnings.catch_warnings():
            # Files that unpack to far more than they are: a warning for Pillow, an error here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except FedkitError:
        raise
    except UnidentifiedImageError as error:
        empty = "is empty" if path.stat().st_size == 0 else "is no picture, or a damaged one"
        raise FedkitError(f"{path} {empty}: replace it or take it away.") from error
    except Exception as error:  # whatever Pillow's reader of a format meets in a damaged file
        raise FedkitError(f"{path} can't be read ({error}): replace it or take it away.") from error
