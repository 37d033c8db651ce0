"""How a learning rate falls, and how a batch grows: functions of where training is, without state."""

from __future__ import annotations

import math

from fedkit.errors import UsageError

DOUBLE = "double"
# Nobody has so many samples.
LARGEST_BATCH = 2**31 - 1


def decay(kind: str, at: float, end: float, factor: float, patience: int) -> float:
    """What a learning rate is multiplied by, in [0, 1].

    Args:
        kind: ``constant``, ``step`` (times ``factor`` every ``patience``), ``cosine`` (half a cosine from
            1 at 0 to 0 at ``end``) or ``inverse`` (1 / (1 + factor at)). What ``plateau`` does hangs on
            the losses: 1 here.
        at: rounds or steps before this one.
        end: at which ``cosine`` has come to 0.
        factor, patience: as ``kind`` says.
    """
    if kind == "cosine":
        return (1 + math.cos(math.pi * at / end)) / 2
    if kind == "step":
        return math.pow(factor, at // max(patience, 1))
    if kind == "inverse":
        return 1 / (1 + factor * at)
    return 1.0


def warmed(at: float, length: int) -> float:
    """What a learning rate is multiplied by while it warms up: (at + 1) / length, then 1.

    Linear, as in Goyal et al. 2017 (arXiv 1706.02677, 2.2), who begin at the rate of one small batch
    and not at a ``length``-th of the whole.
    """
    return min(1.0, (at + 1) / length) if length else 1.0


def batch_size(schedule: str, first: int, round: int) -> int:
    """The size of a private batch in a round, counted from 1.

    Args:
        schedule: empty; ``double:N``: twice as large every N rounds; or ``ROUND:SIZE,...``: from that
            round on.
        first: the size where the schedule says nothing else.
        round: which one.

    Raises:
        UsageError: the schedule can't be read.
    """
    every, sizes = _read(schedule)
    if every:
        return min(first << min((max(round, 1) - 1) // every, 31), LARGEST_BATCH)
    return max(((start, size) for start, size in sizes if start <= round), default=(0, first))[1]


def largest_batch(schedule: str, first: int, rounds: int) -> int:
    """The largest size of a private batch in a run of so many rounds; ``UsageError`` as above."""
    every, sizes = _read(schedule)
    if every:
        return batch_size(schedule, first, rounds)
    return max(first, *(size for start, size in sizes if start <= rounds), 0)


def _read(schedule: str) -> tuple[int, list[tuple[int, int]]]:
    """Rounds between two doublings (0: none), and sizes by the round that they begin with."""
    if not schedule:
        return 0, []
    kind, _, number = schedule.partition(":")
    if kind.strip() == DOUBLE and number.strip().isdecimal() and int(number):
        return int(number), []
    sizes = []
    for pair in schedule.split(","):
        start, _, size = (word.strip() for word in pair.partition(":"))
        if not (
            start.isdecimal() and size.isdecimal() and int(start) and 0 < int(size) <= LARGEST_BATCH
        ):
            raise UsageError(
                "batch-schedule takes double:ROUNDS, as in double:10, or ROUND:SIZE pairs, as in "
                f"1:16,10:32, not {schedule!r}."
            )
        sizes.append((int(start), int(size)))
    if sorted({start for start, _ in sizes}) != [start for start, _ in sizes]:
        raise UsageError(f"The rounds of batch-schedule must rise, not as in {schedule!r}.")
    return 0, sizes
