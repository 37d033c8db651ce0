"""What well-known data sets look like, so that a network's cost is told without their files."""

from __future__ import annotations

from typing import NamedTuple

from fedkit.registry import split


class Look(NamedTuple):
    """What a network sees of a data set.

    Attributes:
        shape: of one sample: channels, height and width; number of features; length of sequences.
        classes: number of logits.
        tokens: whether samples are sequences of tokens; None where a row may be either.
    """

    shape: tuple[int, ...]
    classes: int
    tokens: bool | None = False


KNOWN = {
    "digits": Look((1, 8, 8), 10),
    "mnist": Look((1, 28, 28), 10),
    "fashion-mnist": Look((1, 28, 28), 10),
    "emnist:balanced": Look((1, 28, 28), 47),
    "emnist:letters": Look((1, 28, 28), 26),
    "cifar10": Look((3, 32, 32), 10),
    "cifar100": Look((3, 32, 32), 100),
    "cifar100:coarse": Look((3, 32, 32), 20),
    "shakespeare": Look((80,), 80, tokens=True),
    "synthetic": Look((60,), 10),
}


def known_look(spec: str) -> Look | None:
    """What the data set ``spec`` looks like; None if that is known from its files alone."""
    name, _ = split(spec)
    return KNOWN.get(name if name == "synthetic" else spec)
