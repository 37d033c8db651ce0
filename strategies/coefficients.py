"""KT-pFL's knowledge coefficient matrix: pure functions on arrays (algorithms.md 6).

``c`` is float64, N x N; row n holds the weights that client n puts on everyone, on the simplex. ``soft``
are the soft predictions S_1 .. S_N, each float32, M x C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.knowledge.codecs import Logits

Matrix: TypeAlias = NDArray[np.float64]


def mix(coefficients: Matrix, soft: Sequence[Logits]) -> list[Logits]:
    """T_n = sum_l c_nl S_l (float32, M x C) for each row of c (R x N), folded in float64."""
    return [_mix_row(row, soft) for row in coefficients]


def projection_step(
    coefficients: Matrix,
    soft: Sequence[Logits],
    shares: NDArray[np.float64],
    *,
    rate: float,
    penalty: float,
    divergence_weight: float,
) -> Matrix:
    """One projected gradient step on c (paper form, algorithms.md 6).

    dL/dc_nl = lambda (n_n/n) 1/M sum_ij S_l (log(T_n / S_n) + 1) + 2 rho (c_nl - 1/N)

    Args:
        coefficients: c, N x N, rows on the simplex.
        soft: S_1 .. S_N, each M x C with rows on the simplex.
        shares: n_n / n.
        rate: eta3.
        penalty: rho.
        divergence_weight: lambda.
    """
    stacked = np.stack([s.astype(np.float64).ravel() for s in soft])
    tiny = np.finfo(np.float32).tiny
    logs = np.log(np.maximum(stacked, tiny))
    rows = len(soft[0])
    gradient = np.empty_like(coefficients)
    for n, row in enumerate(coefficients):
        ratio = np.log(np.maximum(row @ stacked, tiny)) - logs[n] + 1.0
        gradient[n] = divergence_weight * shares[n] / rows * (stacked @ ratio)
    gradient += 2 * penalty * (coefficients - 1 / len(soft))
    return project_to_simplex(coefficients - rate * gradient)


def softmax_step(coefficients: Matrix, soft: Sequence[Logits], *, penalty: float) -> Matrix:
    """One step on c as the authors' code takes it (algorithms.md 6, code form).

    dJ_k/dc_kl = -2/(MC) <S_k - T_k, S_l> + 2 rho/N (c_kl - 1/N), which needs only the Gram matrix
    G_kl = <S_k, S_l>; then an adaptive step and softmax(5 v), row by row.
    """
    stacked = np.stack([s.astype(np.float64).ravel() for s in soft])
    gram = stacked @ stacked.T
    size, count = stacked.shape[1], len(soft)
    gradient = -2 / size * (gram - coefficients @ gram)
    gradient += 2 * penalty / count * (coefficients - 1 / count)
    rates = np.array([adaptive_rate(float(np.abs(row).mean())) for row in gradient])
    scores = 5 * (coefficients - rates[:, None] * gradient)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    normalised: Matrix = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normalised


def adaptive_rate(mean_gradient: float) -> float:
    """The code's step size for a row whose mean absolute gradient is s: lr s ends in [.01, .05]."""
    rate = 1.0
    for _ in range(5):
        if mean_gradient > 0.01:
            mean_gradient /= 5
            rate /= 5
        if mean_gradient < 0.01:
            mean_gradient *= 5
            rate *= 5
    return rate


def grow(coefficients: Matrix, count: int) -> Matrix:
    """Room for ``count`` more clients: new rows and columns are 1/N', old rows shrink to sum to 1."""
    old = len(coefficients)
    new = old + count
    grown = np.full((new, new), 1 / new)
    grown[:old, :old] = coefficients * (old / new)
    return grown


def project_to_simplex(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest point (Euclidean) of the simplex for each row (float64, R x N).

    Sort descending, take the last j with u_j > (sum_{i<=j} u_i - 1) / j, subtract that threshold and
    clip at 0 (Held, Wolfe & Crowder 1974; Duchi et al. 2008, figure 1).
    """
    # The projection does not depend on a common shift; small numbers keep their digits.
    rows = rows - rows.max(axis=1, keepdims=True)
    descending = -np.sort(-rows, axis=1)
    thresholds = (np.cumsum(descending, axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = rows.shape[1] - 1 - np.argmax((descending > thresholds)[:, ::-1], axis=1)
    chosen: NDArray[np.float64] = thresholds[np.arange(len(rows)), last]
    return np.maximum(rows - chosen[:, None], 0.0)


def _mix_row(row: NDArray[np.float64], soft: Sequence[Logits]) -> Logits:
    total: Matrix = np.zeros(soft[0].shape, dtype=np.float64)
    for weight, predictions in zip(row, soft, strict=True):
        total += weight * predictions
    return total.astype(np.float32)
