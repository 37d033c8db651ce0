"""How much memory a device grants its training. Imports nothing heavy."""

from __future__ import annotations

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


def check_budget(needed: int, budget: int) -> None:
    """Raise ``FedkitError`` with both figures if ``needed`` bytes are more than ``budget``."""
    from fedkit.report import size

    if needed > budget:
        raise FedkitError(
            f"Training needs {size(needed)} of memory and the budget is {size(budget)}: take a smaller "
            "model or batch, or raise the budget."
        )
