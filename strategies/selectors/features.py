"""What an agent sees of its client: s_n in R^{2h+6}, in the measure of the clients that are probed with it.

Losses, seconds, bytes and samples are logarithms of their ratio to the median of the probed clients
(ours: so a policy holds for networks and devices of another scale, and one client that lies moves the
others by the place of one); then they are standardised by running statistics that are saved with the
policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkit.engine.roster import Member
from fedkit.engine.selection import Probe, Seen, View

# Nothing that is measured is smaller, in its unit; 0 has no logarithm.
SMALLEST = 1e-6
# Nobody is taken to be farther from the median than by this factor.
LARGEST_RATIO = 100.0
# A feature that hardly varied in training must not become a huge number where it does.
LEAST_DEVIATION = 0.1
FARTHEST = 5.0


def width(history: int) -> int:
    """Numbers that an agent sees: 2h + 6."""
    return 2 * history + 6


def observe(
    view: View,
    members: Sequence[Member],
    probes: Mapping[int, Probe],
    history: int,
    worst_loss: float,
) -> NDArray[np.float32]:
    """The features of those probed, before they are standardised (float32, n x 2h+6).

    Columns: loss; the last h probing latencies, the present one first; the last h upload latencies,
    the newest first; upload bytes; samples; seconds from the decision to the end that are expected
    (ours, ``_finish``); log(1 + rounds that passed since the client last counted) (ours: what it alone
    has is forgotten by and by); log(1 + rounds that are left) (ours, for t, which would mean something
    else in a run of another length). Where a client has no history yet, the median of those that have
    stands for it, and nothing where none has.

    Args:
        view: the round's.
        members: those probed, n.
        probes: what they told, by client index.
        history: h.
        worst_loss: stands for a loss that is no number.
    """
    losses, latencies, uploads, sizes, works, passed = [], [], [], [], [], []
    for member in members:
        probe, seen = probes[member.client], view.seen.get(member.client, Seen())
        losses.append(probe.loss if math.isfinite(probe.loss) else worst_loss)
        latencies.append(_newest([*seen.probe_seconds[-history:], probe.seconds], history))
        uploads.append(_newest(seen.transfer_seconds, history))
        sizes.append(probe.upload_bytes)
        works.append(_work(seen))
        passed.append(view.round - 1 - max(seen.rounds, default=0))
    left = max(view.rounds - view.round, 0)
    columns = [
        _relative(losses),
        *(_relative(column) for column in np.array(latencies).T),
        *(_relative(column) for column in np.array(uploads).T),
        _relative(sizes),
        _relative([member.examples for member in members]),
        _relative(_finish(latencies, uploads, works)),
        np.log1p(np.maximum(passed, 0)),
        np.full(len(members), math.log1p(left)),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _work(seen: Seen) -> float:
    """How many times as long as its probe a client's whole work took, when it last was through; or NaN."""
    probes = dict(zip(seen.probed, seen.probe_seconds, strict=False))
    last = probes.get(seen.rounds[-1], 0.0) if seen.rounds else 0.0
    return seen.seconds[-1] / last if last > 0 else math.nan


def _finish(
    latencies: Sequence[Sequence[float]],
    uploads: Sequence[Sequence[float]],
    works: Sequence[float],
) -> NDArray[np.float64]:
    """Seconds that each would take from the decision to the end of its upload.

    The present probe times what the probed clients' whole work is of a probe beyond it (the median: all
    are given the same epochs), and the last upload, or the median of those known.
    """
    known = np.array(works)[np.isfinite(works)]
    beyond = max(float(np.median(known)) - 1, 0.0) if len(known) else 1.0
    last = np.array([column[0] for column in uploads])
    sending = np.isfinite(last)
    missing = np.median(last[sending]) if sending.any() else 0.0
    expected: NDArray[np.float64] = beyond * np.array([column[0] for column in latencies])
    return expected + np.where(sending, last, missing)


def _newest(values: Sequence[float], history: int) -> list[float]:
    """The last h values, the newest first; NaN where there are fewer."""
    newest = list(values)[: -history - 1 : -1]
    return newest + [math.nan] * (history - len(newest))


def _relative(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """log(x / median x), bounded, where numbers that are missing count as the median."""
    column = np.asarray(values, dtype=np.float64)
    known = np.isfinite(column)
    if not known.any():
        return np.zeros(len(column))
    middle = max(float(np.median(column[known])), SMALLEST)
    ratios = np.maximum(np.where(known, column, middle), SMALLEST) / middle
    relative: NDArray[np.float64] = np.log(np.clip(ratios, 1 / LARGEST_RATIO, LARGEST_RATIO))
    return relative


@dataclass
class Standard:
    """Running mean and deviation of each feature (Welford), over all that was seen in learning.

    Attributes:
        count: rows seen.
        mean: float64, of each feature.
        squares: float64, sum of squared distances from the mean.
    """

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of_width(cls, features: int) -> Standard:
        """Before anything was seen: nothing is moved, nothing scaled down."""
        return cls(0, np.zeros(features), np.zeros(features))

    def take_in(self, rows: NDArray[np.float32]) -> None:
        """Add rows (n x features)."""
        more = rows.astype(np.float64)
        count = self.count + len(more)
        distance = more.mean(axis=0) - self.mean
        self.squares = self.squares + ((more - more.mean(axis=0)) ** 2).sum(axis=0)
        self.squares = self.squares + distance**2 * self.count * len(more) / count
        self.mean = self.mean + distance * len(more) / count
        self.count = count

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows of any leading shape in deviations from the mean, cut off at 5."""
        variance = self.squares / self.count if self.count else np.ones_like(self.mean)
        deviation = np.maximum(np.sqrt(variance), LEAST_DEVIATION)
        return np.clip((rows - self.mean) / deviation, -FARTHEST, FARTHEST).astype(np.float32)
