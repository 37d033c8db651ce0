"""What stands after a model's name: ``mlp:200,100``, ``preresnet18:0.5,depth=3,group``."""

from __future__ import annotations

import math
from collections.abc import Collection

from fedkit.errors import UsageError

NORMS = ("batch", "group", "none")
# Wide enough for any network of these; a number typed with some digits too many is told.
WIDEST = 65536


def no_argument(name: str, argument: str | None) -> None:
    """Raise ``UsageError`` if a model that takes no argument was given one."""
    if argument is not None:
        raise UsageError(f"The model {name} takes no argument, not {argument!r}.")


def one_of(name: str, argument: str | None, allowed: Collection[str]) -> str | None:
    """The argument as it is if it is one of ``allowed``, or None if there is none."""
    if argument is not None and argument not in allowed:
        raise UsageError(f"The model {name} takes {_either(allowed)} after it, not {argument!r}.")
    return argument


def sizes(
    name: str, argument: str | None, default: tuple[int, ...], most: int = 16
) -> tuple[int, ...]:
    """Numbers of hidden units, at most ``most`` of them: ``200,100``.

    Raises:
        UsageError: they are none.
    """
    if argument is None:
        return default
    try:
        found = tuple(int(word) for word in argument.split(","))
    except ValueError:
        found = ()
    if not 1 <= len(found) <= most or not all(1 <= size <= WIDEST for size in found):
        example = ",".join(str(size) for size in default)
        numbers = "a number" if most == 1 else f"up to {most} numbers"
        raise UsageError(
            f"The model {name} takes {numbers} of hidden units from 1 to {WIDEST}, as in "
            f"{name}:{example}, not {argument!r}."
        )
    return found


def split_width(name: str, argument: str | None) -> tuple[float, list[str]]:
    """The width of ``0.5,group`` (also ``width=0.5``; 1 if none is given), and the other words.

    Raises:
        UsageError: the width is not in (0, 1], or there are two.
    """
    found, others = [], []
    for word in argument.split(",") if argument is not None else []:
        text = word.removeprefix("width=")
        try:
            found.append(float(text))
        except ValueError:
            if text == word:
                others.append(word)
            else:
                found.append(math.nan)
    if len(found) > 1 or not all(0 < width <= 1 for width in found):
        raise UsageError(
            f"The model {name} takes a width above 0 and up to 1, as in {name}:0.5, not {argument!r}."
        )
    return (found[0] if found else 1.0), others


def norm_and_depth(name: str, words: list[str], deepest: int | None) -> tuple[str, int]:
    """The normalisation (batch unless given) and the depth (``depth=2``; all unless given).

    ``deepest`` is None for a network whose depth is fixed.

    Raises:
        UsageError: a word is neither, or given twice.
    """
    depths = {f"depth={number}": number for number in range(1, (deepest or 0) + 1)}
    norms = [word for word in words if word in NORMS]
    kept = [depths[word] for word in words if word in depths]
    if len(norms) > 1 or len(kept) > 1 or len(norms) + len(kept) < len(words):
        depth = f" and depth=1 to depth={deepest}" if deepest else ""
        raise UsageError(
            f"The model {name} takes a width, one of {_either(NORMS)}{depth}, not {','.join(words)!r}."
        )
    return (norms or ["batch"])[0], (kept or [deepest or 0])[0]


def _either(words: Collection[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
