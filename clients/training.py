"""The local trainer: batches and losses. No messages and no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkit.data.samples import Samples

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def make_optimiser(
    name: str, model: nn.Module, learning_rate: float, momentum: float = 0.0
) -> torch.optim.Optimizer:
    """``sgd`` or ``adam`` over a model's parameters; Adam with Keras' epsilon, as FedMD's code."""
    parameters = list(model.parameters())
    # One pass over memory instead of several: a step of ResNet-18 takes a quarter of the time.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, eps=1e-7, fused=fused)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, fused=fused)


def train(
    model: nn.Module,
    samples: Samples,
    targets: Tensor,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Minimise ``loss(logits, targets)`` over shuffled batches; returns the last epoch's mean loss.

    Args:
        model: in train mode while this runs.
        samples: n images.
        targets: n labels (int64) or n x C soft targets.
        loss: mean over a batch.
        optimiser: steps once a batch.
        epochs: passes over the samples; 0 leaves everything as it is.
        batch_size: samples a step; a last batch of a single sample is left out where there are
            others, because batch normalisation has no variance for it.
        generator: the order of the samples.
    """
    model.train()
    mean = 0.0
    for _ in range(epochs):
        total, seen = torch.zeros((), device=samples.images.device), 0
        for batch in _batches(len(samples), batch_size, generator):
            batch = batch.to(samples.images.device)
            optimiser.zero_grad(set_to_none=True)
            value = loss(model(samples.inputs(batch)), targets[batch])
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += value.detach() * len(batch)
            seen += len(batch)
        mean = float(total) / max(seen, 1)
    return mean


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with hard labels, mean over the batch."""
    return functional.cross_entropy(logits, labels)


def absolute_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference over samples and classes (FedMD's digest)."""
    return functional.l1_loss(logits, targets)


def kl_divergence(temperature: float, *, reduction: str, scale: float = 1.0) -> Loss:
    """scale * KL(p || softmax(z / temperature)) with teacher p given as probabilities.

    Args:
        temperature: the student's temperature (the teacher's is in p already).
        reduction: ``batchmean`` sums over classes and averages over samples (the definition);
            ``mean`` divides by the number of classes as well (what KT-pFL's code does).
        scale: factor in front, e.g. temperature^2 to keep the gradient's size.
    """

    def loss(logits: Tensor, probabilities: Tensor) -> Tensor:
        # Both sides as logarithms: KL(p || p) is then exactly 0 (algorithms.md 0.3.11).
        student = functional.log_softmax(logits / temperature, dim=1)
        teacher = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return scale * (divergence / logits.shape[1] if reduction == "mean" else divergence)

    return loss


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    for at in range(0, count, size):
        batch = order[at : at + size]
        if len(batch) > 1 or count == 1 or size == 1:
            yield batch
