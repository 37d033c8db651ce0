"""KT-pFL's knowledge coefficient matrix: pure functions on arrays (algorithms.md 6).

``c`` is float64, N x N; row n holds the weights that client n puts on everyone, on the simplex. ``soft``
are the soft predictions S_1 .. S_N, each float32, M x C. They stay as they came: sums are formed in
float64 on a block of columns of their N x MC stack at a time, so that a thousand clients fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fedkit.knowledge.codecs import Logits

Matrix: TypeAlias = NDArray[np.float64]

# Columns of the N x MC stack that are held as float64 at a time.
BLOCK = 4096
# Rows of c that mix multiplies at a time.
GROUP = 32
# A squared distance below this part of the largest squared norm is what rounding to float32 leaves.
_SAME = 1e-12


def mix(coefficients: Matrix, soft: Sequence[Logits]) -> list[Logits]:
    """T_n = sum_l c_nl S_l for each row of c, folded in float64 (algorithms.md 6, step 3).

    A target does not depend on what other rows are asked for: to the bit with OpenBLAS on AVX2 and
    AVX-512, anywhere up to the rounding of a float64 sum. Unit rows give S_n itself, equal S_l give S_l
    back (to the bit from a uniform row); ``soft`` may also be raw logits. A call costs one pass over
    ``soft`` and the products of its rows, rounded up to a multiple of ``GROUP``: ask for many at a time.

    Args:
        coefficients: rows of c, float64, R x N, any R >= 0.
        soft: S_1 .. S_N, each float32, M x C, finite.

    Returns:
        T_1 .. T_R, float32, M x C, views of one array.
    """
    count, shape = len(coefficients), soft[0].shape
    # How BLAS rounds a row depends on how many rows there are (one takes another kernel, an odd number
    # leaves a last one over), not on where it is among 32: so all products have as many, the rest is 0.
    padded = np.zeros((-(-count // GROUP) * GROUP, coefficients.shape[1]))
    padded[:count] = coefficients
    targets = np.empty((count, soft[0].size), dtype=np.float32)
    for columns, block in _blocks(soft):
        for first in range(0, count, GROUP):
            group = slice(first, first + GROUP)
            targets[group, columns] = (padded[group] @ block)[: count - first]
    return [target.reshape(shape) for target in targets]


def projection_step(
    coefficients: Matrix,
    soft: Sequence[Logits],
    shares: NDArray[np.float64],
    *,
    rate: float,
    penalty: float,
    divergence_weight: float,
) -> Matrix:
    """One projected gradient step on c (Zhang et al. 2021, paper form; algorithms.md 6).

    dL/dc_nl = lambda (n_n/n) 1/M sum_ij S_l (log(T_n / S_n) + 1) + 2 rho (c_nl - 1/N)

    Equal S_l leave a uniform c; penalty -> infinity (with a small step) leads to 1/N.

    Args:
        coefficients: c, float64, N x N, rows on the simplex.
        soft: S_1 .. S_N, each float32, M x C, with rows on the simplex; entries of 0 are taken as the
            smallest normal float32.
        shares: n_n / n, float64, N.
        rate: eta3.
        penalty: rho.
        divergence_weight: lambda.

    Returns:
        The new c, float64, N x N, rows on the simplex.
    """
    tiny = np.finfo(np.float32).tiny
    gradient = np.zeros_like(coefficients)
    for _, block in _blocks(soft):
        np.maximum(block, tiny, out=block)
        gradient += _log_ratios(coefficients, block) @ block.T
    gradient *= divergence_weight / len(soft[0]) * shares[:, None]
    gradient += 2 * penalty * (coefficients - 1 / len(soft))
    return project_to_simplex(coefficients - rate * gradient)


def softmax_step(coefficients: Matrix, soft: Sequence[Logits], *, penalty: float) -> Matrix:
    """One step on c as the authors' code takes it (algorithms.md 6, code form).

    dJ_k/dc_kl = -2/(MC) <S_k - T_k, S_l> + 2 rho/N (c_kl - 1/N), which needs only the Gram matrix;
    then an adaptive step and softmax(5 v), row by row. Equal S_l leave a uniform c.

    Args:
        coefficients: c, float64, N x N, rows on the simplex.
        soft: S_1 .. S_N, each float32, M x C.
        penalty: rho.

    Returns:
        The new c, float64, N x N, rows on the simplex and without zeros.
    """
    count = len(soft)
    products = gram(soft)
    gradient = -2 / soft[0].size * (products - coefficients @ products)
    gradient += 2 * penalty / count * (coefficients - 1 / count)
    rates = np.array([adaptive_rate(float(np.abs(row).mean())) for row in gradient])
    scores = 5 * (coefficients - rates[:, None] * gradient)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    normalised: Matrix = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normalised


def adaptive_rate(mean_gradient: float) -> float:
    """The code's step size for a row whose mean absolute gradient is s: lr s ends in [.01, .05].

    Five rounds of factors 5 reach s from 3.2e-6 to 156; the step for s = 0 is 5^5.
    """
    rate = 1.0
    for _ in range(5):
        if mean_gradient > 0.01:
            mean_gradient /= 5
            rate /= 5
        if mean_gradient < 0.01:
            mean_gradient *= 5
            rate *= 5
    return rate


def cluster_rows(soft: Sequence[Logits], clusters: int, seed: int) -> Matrix:
    """The matrix by which each client learns from the mean of its own cluster (COMET).

    k-means on the flattened predictions; c_nl = 1 / |cluster of n| for l in it, 0 elsewhere (clustered
    co-distillation, Cho et al., arXiv 2109.08119, without its regulariser). k-means sees distances
    only, so it runs on N coordinates per client that have them all. Predictions that are equal up to
    float32 rounding share a cluster, so there may be fewer clusters than asked for.

    Args:
        soft: S_1 .. S_N, each float32, M x C; probabilities or logits.
        clusters: number of clusters, >= 1; 1 gives the uniform matrix, N or more always the identity.
        seed: any integer >= 0, of which k-means takes the lower 32 bits.

    Returns:
        c, float64, N x N, symmetric, rows on the simplex.
    """
    count = len(soft)
    if clusters >= count:
        return np.eye(count)
    # Only a server that clusters pays for the import.
    from sklearn.cluster import KMeans

    points = _coordinates(gram(soft))
    means = KMeans(
        min(clusters, len(np.unique(points, axis=0))), n_init=10, random_state=seed % 2**32
    )
    # Threads would add up a cluster in the order in which they finish.
    with threadpool_limits(1, user_api="openmp"):
        labels = means.fit_predict(points)
    together = (labels[:, None] == labels).astype(np.float64)
    rows: Matrix = together / together.sum(axis=1, keepdims=True)
    return rows


def gram(soft: Sequence[Logits]) -> Matrix:
    """G_kl = <S_k, S_l> over all samples and classes (float64, N x N, symmetric)."""
    products = np.zeros((len(soft), len(soft)))
    for _, block in _blocks(soft):
        products += block @ block.T
    return products


def grow(coefficients: Matrix, count: int) -> Matrix:
    """Room for ``count`` more clients: new rows and columns are 1/N', old rows shrink to sum to 1.

    float64, N x N to N' x N' with N' = N + ``count`` (algorithms.md 6, edge cases).
    """
    old = len(coefficients)
    new = old + count
    grown = np.full((new, new), 1 / new)
    grown[:old, :old] = coefficients * (old / new)
    return grown


def shrink(coefficients: Matrix, index: int) -> Matrix:
    """c without client ``index``, the other rows rescaled to sum to 1 (float64, N-1 x N-1).

    A row that had all its mass on the one who left becomes uniform. Undoes ``grow`` by one.
    """
    return restrict(coefficients, np.delete(np.arange(len(coefficients)), index).tolist())


def restrict(
    coefficients: Matrix, at: Sequence[int], columns: Sequence[int] | None = None
) -> Matrix:
    """Rows ``at`` of c over some columns (the same, if not given), rescaled to sum to 1 (float64, K x L).

    c_nl / sum_{j in columns} c_nj, or 1/L for a row without mass there (algorithms.md 6, partial
    participation).
    """
    columns = at if columns is None else columns
    part = coefficients[np.ix_(at, columns)]
    mass = part.sum(axis=1, keepdims=True)
    return np.where(mass > 0, part / np.where(mass > 0, mass, 1.0), 1 / max(len(columns), 1))


def project_to_simplex(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest point (Euclidean) of the simplex for each row (float64, R x N).

    Sort descending, take the last j with u_j > (sum_{i<=j} u_i - 1) / j, subtract that threshold and
    clip at 0 (Held, Wolfe & Crowder 1974; Duchi et al. 2008, figure 1). Points of the simplex stay.
    """
    # The projection does not depend on a common shift; small numbers keep their digits.
    rows = rows - rows.max(axis=1, keepdims=True)
    descending = -np.sort(-rows, axis=1)
    thresholds = (np.cumsum(descending, axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = rows.shape[1] - 1 - np.argmax((descending > thresholds)[:, ::-1], axis=1)
    chosen: NDArray[np.float64] = thresholds[np.arange(len(rows)), last]
    return np.maximum(rows - chosen[:, None], 0.0)


def _log_ratios(coefficients: Matrix, block: Matrix) -> Matrix:
    """log(T_n / S_n) + 1 on a block of columns (float64, N x BLOCK), held once."""
    ratios = coefficients @ block
    ratios /= block
    np.log(ratios, out=ratios)
    ratios += 1.0
    return ratios


def _coordinates(products: Matrix) -> Matrix:
    """N points in N dimensions with the distances that the Gram matrix implies (float64, N x N).

    Classical scaling: the centred matrix is V diag(w) V^T, the points are the rows of V diag(sqrt w).
    """
    centred = products - products.mean(axis=0) - products.mean(axis=1)[:, None] + products.mean()
    values, vectors = np.linalg.eigh(centred)
    points = vectors * np.sqrt(np.maximum(values, 0.0))
    norms = np.diag(products)
    distances = norms[:, None] + norms - 2 * products
    # Equal predictions differ here by the eigenvectors' rounding, which k-means would take for structure.
    first = np.argmax(distances <= _SAME * norms.max(), axis=1)
    chosen: Matrix = points[first]
    return chosen


def _blocks(soft: Sequence[Logits]) -> Iterator[tuple[slice, Matrix]]:
    """Columns of the N x MC stack as float64 (N x BLOCK or fewer); each overwrites the one before."""
    flat = [predictions.reshape(-1) for predictions in soft]
    size = len(flat[0])
    buffer = np.empty((len(flat), min(BLOCK, size)))
    for start in range(0, size, BLOCK):
        columns = slice(start, min(start + BLOCK, size))
        block = buffer[:, : columns.stop - start]
        np.stack([predictions[columns] for predictions in flat], out=block)
        yield columns, block
