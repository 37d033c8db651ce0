"""Checks of data settings that need no data: names, counts, defaults. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import replace

from fedkit.errors import UsageError
from fedkit.registry import check, code_of, load, split, suggest
from fedkit.settings import FederationSettings

DEFAULT_PUBLIC = {"digits": 400, "synthetic": 1000}
DEFAULT_PUBLIC_OTHERS = 5000
# No data set of the federation's: every client brings its own, and the server names the classes.
OWN = "own"
# One file each, and nothing to choose.
WITHOUT_ARGUMENT = ("digits", "mnist", "fashion-mnist", "cifar10")
AUGMENTATIONS = ("none", "flip", "crop", "rotate")
# Data sets of which only their owner knows how large they are.
OF_FILES = ("folder", "csv")


def resolve_public(settings: FederationSettings) -> FederationSettings:
    """Settings whose public set is spelled out."""
    if settings.public != "auto":
        return settings
    if split(settings.dataset)[0] == OWN:
        raise UsageError(
            "With clients' own data alone there is nothing to take a public set from: give "
            "--public DATASET[:COUNT], as in folder:PATH or cifar10:5000."
        )
    if not _is_published(settings.dataset):
        raise UsageError(
            f"How much of {settings.dataset} is the public set? Give --public "
            f"{settings.dataset}:COUNT, or another data set."
        )
    count = DEFAULT_PUBLIC.get(split(settings.dataset)[0], DEFAULT_PUBLIC_OTHERS)
    return replace(settings, public=f"{settings.dataset}:{count}")


def public_parts(settings: FederationSettings) -> tuple[str, int | None]:
    """The public set's data set and how many of its training samples; None: all of them.

    Raises:
        UsageError: it is a part of the private data, and does not say how large a part.
    """
    name, colon, count = settings.public.rpartition(":")
    if colon and count.removeprefix("-").isdigit():
        return name, int(count)
    if settings.public == settings.dataset:
        raise UsageError(
            f"public must be NAME:COUNT, as in {settings.dataset}:400, where it is a part of the "
            f"private data set, not {settings.public!r}."
        )
    return settings.public, None


def partition_specs(settings: FederationSettings) -> list[str]:
    """The partition, and the one that it wraps (``share:BETA+PARTITION``)."""
    outer, plus, inner = settings.partition.partition("+")
    wraps = plus and split(outer)[0] == "share"
    return [settings.partition, inner] if wraps else [settings.partition]


def check_dataset(spec: str) -> None:
    """Raise ``UsageError`` unless ``spec`` names a data set, with no argument where it takes none."""
    check("datasets", spec)
    name, argument = split(spec)
    if argument is not None and name in WITHOUT_ARGUMENT:
        raise UsageError(f"The data set {name} takes no argument: {spec} is too much.")


def _is_published(dataset: str) -> bool:
    return split(dataset)[0] not in OF_FILES and code_of("datasets", dataset) is None


def check_names(settings: FederationSettings) -> None:
    """Raise ``UsageError`` for anything named in the settings that does not exist."""
    check("strategies", settings.strategy)
    check("models", settings.model)
    check("selectors", settings.select)
    check_dataset(settings.dataset)
    for spec in partition_specs(settings):
        check("partitions", spec)
    for step in settings.augment.split(","):
        name, _ = split(step)
        if name not in AUGMENTATIONS:
            raise UsageError(f"There is no augmentation {name!r}{suggest(name, AUGMENTATIONS)}.")
    try:
        check_dataset(public_parts(resolve_public(settings))[0])
    except UsageError as error:
        raise UsageError(f"public {settings.public!r}: {error}") from None
    # Made once to see whether their arguments make sense.
    for spec in settings.codec.split(","):
        name, argument = split(spec.strip())
        load("codecs", name)(argument)
    name, argument = split(settings.select)
    load("selectors", name)(argument)
