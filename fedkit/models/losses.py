"""Losses: towards labels, and towards what others know. Means over a batch, as scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Loss: TypeAlias = Callable[..., Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels (int64, B)."""
    return functional.cross_entropy(logits, labels)


def masked_cross_entropy(held: Tensor) -> Loss:
    """Cross-entropy in which logits of classes that nobody here has count as 0 (HeteroFL).

    They stay in the denominator. Where all are held it is ``cross_entropy`` itself.

    Args:
        held: which classes there are (bool, C).
    """
    if held.all():
        return cross_entropy
    lacking = ~held

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.masked_fill(lacking, 0.0), labels)

    return loss


def absolute_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference over samples and classes (FedMD's digest)."""
    return functional.l1_loss(logits, targets)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over samples and classes."""
    return functional.mse_loss(logits, targets)


def kl_divergence(temperature: float, *, reduction: str, scale: float = 1.0) -> Loss:
    """scale * KL(p || softmax(z / temperature)) with teacher p given as probabilities.

    Args:
        temperature: the student's temperature (the teacher's is in p already).
        reduction: ``batchmean`` sums over classes and averages over samples (the definition);
            ``mean`` divides by the number of classes as well (what KT-pFL's code does).
        scale: factor in front, e.g. temperature^2 to keep the gradient's size.
    """

    def loss(logits: Tensor, probabilities: Tensor) -> Tensor:
        # Both sides as logarithms: KL(p || p) is then 0 to rounding (algorithms.md 0.3.11).
        student = functional.log_softmax(logits / temperature, dim=1)
        teacher = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return scale * (divergence / logits.shape[1] if reduction == "mean" else divergence)

    return loss


def towards(
    loss: str, *, space: str, temperature: float, reduction: str = "batchmean", scale: float = 1.0
) -> Loss:
    """The loss of a student against knowledge that came from others.

    Args:
        loss: ``kl``, ``mse`` or ``l1``.
        space: what the targets are: ``logit`` (raw class scores) or ``prob`` (softened by the
            temperature already). Errors are taken in that space; KL is always between probabilities.
        temperature: tau on the student's side, and on the targets' where they are raw.
        reduction, scale: as in ``kl_divergence``; ``scale`` multiplies every loss.
    """
    if loss == "kl":
        divergence = kl_divergence(temperature, reduction=reduction, scale=scale)
        if space == "prob":
            return divergence
        return lambda logits, targets: divergence(logits, soften(targets, temperature))
    error = absolute_error if loss == "l1" else squared_error
    if space == "prob":
        return lambda logits, targets: scale * error(soften(logits, temperature), targets)
    return lambda logits, targets: scale * error(logits, targets)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """softmax(z / temperature), row by row."""
    return torch.softmax(logits / temperature, dim=1)
