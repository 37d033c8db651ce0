"""Many small networks side by side: a perceptron with one hidden layer for each client (NumPy).

What a step computes for one client does not depend on who else is there, to the bit: each has matrix
products of its own. Clients are in order of their samples, the most first, so that those that still have
a batch are always the first few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]
# Weights of the hidden layer, its bias, weights of the outputs, their bias; the stack of many networks
# has one dimension more, in front.
Weights: TypeAlias = tuple[Floats, Floats, Floats, Floats]


def initial(features: int, hidden: int, classes: int, generator: np.random.Generator) -> Weights:
    """Weights after He et al. 2015 for the hidden layer; the outputs start at 0."""
    first = generator.standard_normal((features, hidden)) * np.sqrt(2 / features)
    return (
        first.astype(np.float32),
        np.zeros(hidden, np.float32),
        np.zeros((hidden, classes), np.float32),
        np.zeros(classes, np.float32),
    )


def copies(weights: Weights, count: int) -> Weights:
    """A stack of ``count`` equal networks."""
    first, bias, second, last = (np.repeat(array[None], count, axis=0) for array in weights)
    return first, bias, second, last


def some(stack: Weights, at: Sequence[int]) -> Weights:
    """Those of a stack."""
    first, bias, second, last = (array[list(at)] for array in stack)
    return first, bias, second, last


def mean(stack: Weights, counts: Sequence[int]) -> Weights:
    """The mean weighted by numbers of samples, folded in float64 (FedAvg)."""
    shares = np.asarray(counts, dtype=np.float64) / sum(counts)
    first, bias, second, last = (
        np.tensordot(shares, array.astype(np.float64), 1).astype(np.float32) for array in stack
    )
    return first, bias, second, last


def train_epoch(
    stack: Weights,
    inputs: Floats,
    labels: Indices,
    orders: Sequence[Indices],
    *,
    rate: float,
    batch: int,
) -> NDArray[np.float64]:
    """One epoch of SGD on the cross-entropy for each network, in place.

    Args:
        stack: K networks.
        inputs: all samples, n x features.
        labels: all labels, n.
        orders: which samples each network reads in which order; the longest first.
        rate: of SGD.
        batch: samples a step; the last one may have fewer.

    Returns:
        The mean loss of each network's epoch, K.
    """
    first, bias, second, last = stack
    lengths = np.array([len(order) for order in orders])
    losses = np.zeros(len(orders))
    for start in range(0, int(lengths[0]), batch):
        active = int((lengths > start).sum())
        sizes = np.minimum(lengths[:active] - start, batch)
        picked = np.zeros((active, batch), dtype=np.int64)
        for row, order in enumerate(orders[:active]):
            picked[row, : sizes[row]] = order[start : start + batch]
        there = (np.arange(batch) < sizes[:, None]).astype(np.float32)
        x, y = inputs[picked], labels[picked]
        before = x @ first[:active] + bias[:active, None]
        hidden = np.maximum(before, 0)
        shares = _softmax(hidden @ second[:active] + last[:active, None])
        rows, columns = np.arange(active)[:, None], np.arange(batch)
        surprise = -np.log(np.maximum(shares[rows, columns, y], 1e-30)) * there
        losses[:active] += surprise.sum(axis=1)
        shares[rows, columns, y] -= 1
        shares *= (there / sizes[:, None].astype(np.float32))[:, :, None]
        back = (shares @ second[:active].transpose(0, 2, 1)) * (before > 0)
        second[:active] -= rate * (hidden.transpose(0, 2, 1) @ shares)
        last[:active] -= rate * shares.sum(axis=1)
        first[:active] -= rate * (x.transpose(0, 2, 1) @ back)
        bias[:active] -= rate * back.sum(axis=1)
    means: NDArray[np.float64] = losses / lengths
    return means


def accuracy(weights: Weights, inputs: Floats, labels: Indices) -> float:
    """Share of the samples that one network gets right."""
    first, bias, second, last = weights
    scores = np.maximum(inputs @ first + bias, 0) @ second + last
    return float((scores.argmax(axis=1) == labels).mean())


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return shares
