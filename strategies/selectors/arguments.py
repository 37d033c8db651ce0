"""What stands after a selector's name, read with care."""

from __future__ import annotations

import math

from fedkit.errors import UsageError


def refuse(name: str, argument: str | None) -> None:
    """Raise ``UsageError`` where a selector that takes no argument is given one."""
    if argument is not None:
        raise UsageError(f"The selector {name} takes no argument.")


def share(name: str, argument: str | None) -> float:
    """A share above 0, at most 1."""
    number = _number(argument)
    if not 0 < number <= 1:
        raise UsageError(f"{name} takes a share, as in {name}:0.1, not {argument!r}.")
    return number


def share_or_count(name: str, argument: str | None) -> float:
    """A share above 0, at most 1, or a whole number of clients above that."""
    number = _number(argument)
    if not (0 < number <= 1 or (1 < number < math.inf and number == int(number))):
        raise UsageError(
            f"{name} takes a share, as in {name}:0.1, or a number of clients, as in {name}:50, not "
            f"{argument!r}."
        )
    return number


def count(name: str, argument: str | None) -> int:
    """A whole number of clients, at least 1."""
    if argument is None or not argument.isdecimal() or not int(argument):
        raise UsageError(f"{name} takes a number of clients, as in {name}:3, not {argument!r}.")
    return int(argument)


def seconds(name: str, argument: str | None) -> float:
    """A time above 0."""
    number = _number(argument)
    if not 0 < number < math.inf:
        raise UsageError(f"{name} takes a number of seconds, as in {name}:30, not {argument!r}.")
    return number


def _number(argument: str | None) -> float:
    try:
        return float(argument or "")
    except ValueError:
        return math.nan
