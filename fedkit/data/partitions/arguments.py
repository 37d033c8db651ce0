"""What stands after a partition's name: ``ALPHA``, then options as in ``0.5,min=5,recut``."""

from __future__ import annotations

from fedkit.errors import UsageError


def nothing(name: str, argument: str | None) -> None:
    """Refuse any argument."""
    if argument is not None:
        raise UsageError(f"{name} takes no argument.")


def options(name: str, argument: str | None, *known: str) -> tuple[str, dict[str, str]]:
    """``0.5,min=5,recut`` is ``0.5`` with the options ``{"min": "5", "recut": ""}``.

    Raises:
        UsageError: an option that is not among ``known``, as ``min=`` or ``recut``.
    """
    value, *rest = (argument or "").split(",")
    found: dict[str, str] = {}
    for option in rest:
        word, equals, text = option.partition("=")
        if word + equals not in known:
            takes = f"takes {' and '.join(known)} after its number" if known else "takes one value"
            raise UsageError(f"{name} {takes}, not {option!r}.")
        found[word] = text
    return value, found


def positive(name: str, text: str | None) -> float:
    """A positive, finite number."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} takes a positive number, as in {name}:0.5, not {text!r}.")
    return value


def share(name: str, text: str, *, zero: bool = False) -> float:
    """A number above 0 (or from 0 on) and up to 1."""
    value = _number(text)
    if not (0 < value <= 1 or (zero and value == 0)):
        raise UsageError(f"{name} takes a share of 1, as in {name}:0.8, not {text!r}.")
    return value


def whole(name: str, text: str | None) -> int:
    """A whole number; its range is the partition's business."""
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(f"{name} takes a whole number, as in {name}:2, not {text!r}.") from None


def least(name: str, text: str | None, default: int) -> int:
    """``min=N``: the fewest samples that a shard may get."""
    if text is None:
        return default
    value = whole(f"min of {name}", text) if text.isdigit() else 0
    if value < 1:
        raise UsageError(f"{name} takes min= with a whole number above 0, not {text!r}.")
    return value


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return float("nan")
