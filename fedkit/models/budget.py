"""How much memory and time a device grants its training. Imports nothing heavy."""

from __future__ import annotations

import math
import re

from fedkit.errors import FedkitError, UsageError

# GB as on a package, GiB as in a kernel's report; a bare letter is the former.
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?i?)b?", re.IGNORECASE)


def read_bytes(text: str) -> int:
    """A number of bytes as people write it: ``512MB`` is 512 million, ``2GiB`` is 2 x 2^30, ``1.5G``.

    Raises:
        UsageError: it is none, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise UsageError(f"A size is a number with a unit, as in 512MB or 2GiB, not {text!r}.")
    return count


def read_seconds(text: str) -> float:
    """A number of seconds; 0 for no limit.

    Raises:
        UsageError: it is none, or below 0.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise UsageError(f"A time budget is a number of seconds, as in 2.5, not {text!r}.")
    return seconds


def read_width(text: str) -> str:
    """The share of its channels at which a device trains a network: in (0, 1], or ``auto``; as it is.

    Raises:
        UsageError: it is neither.
    """
    try:
        share = float("nan" if text == "auto" else text)
    except ValueError:
        share = 0.0
    if text != "auto" and not 0 < share <= 1:
        raise UsageError(f"A width is a number above 0 and up to 1, or auto, not {text!r}.")
    return text


def read_depth(text: str) -> str:
    """How many stages of a network a device trains: a number from 1, or ``auto``; as it is.

    Raises:
        UsageError: it is neither.
    """
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise UsageError(f"A depth is a number of stages, from 1, or auto, not {text!r}.")
    return text


def check_budget(needed: int, budget: int) -> None:
    """Raise ``FedkitError`` with both figures if ``needed`` bytes are more than ``budget``."""
    from fedkit.report import size

    if needed > budget:
        raise FedkitError(
            f"Training needs {size(needed)} of memory and the budget is {size(budget)}: take a smaller "
            "model or batch, or raise the budget."
        )
