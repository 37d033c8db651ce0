"""The trainer: batches, steps and epochs, the same on a device and at the server. No messages, no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from fedkit.data.samples import Samples
from fedkit.models.losses import Loss


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
    targets: Tensor | tuple[Tensor, ...],
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Minimise a loss over shuffled batches; returns the last epoch's mean loss.

    Args:
        model: in train mode while this runs.
        samples: n images.
        targets: n labels (int64) or n x C soft targets, or several such for a loss that wants them.
        loss: ``(logits, *targets) -> mean over a batch``.
        optimiser: steps once a batch.
        epochs: passes over the samples; 0 leaves everything as it is.
        batch_size: samples a step; a last batch of a single sample is left out where there are
            others, because batch normalisation has no variance for it.
        generator: the order of the samples.
    """
    mean = 0.0
    for _ in range(epochs):
        batches = one_epoch(len(samples), batch_size, generator)
        mean = take_steps(model, samples, targets, loss, optimiser, batches)
    return mean


def take_steps(
    model: nn.Module,
    samples: Samples,
    targets: Tensor | tuple[Tensor, ...],
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    *,
    clip: float = 0.0,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> float:
    """One optimiser step for each batch of indices; returns the mean loss over their samples.

    ``clip`` bounds the gradient's norm (0: no bound); ``schedule`` steps with the optimiser.
    """
    model.train()
    device = samples.data.device
    wanted = targets if isinstance(targets, tuple) else (targets,)
    total, seen = torch.zeros((), device=device), 0
    for batch in batches:
        batch = batch.to(device)
        optimiser.zero_grad(set_to_none=True)
        value = loss(model(samples.training_inputs(batch)), *(target[batch] for target in wanted))
        value.backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        if schedule is not None:
            schedule.step()
        total += value.detach() * len(batch)
        seen += len(batch)
    return float(total) / max(seen, 1)


def one_epoch(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices below ``count`` in a random order, ``size`` at a time."""
    order = torch.randperm(count, generator=generator)
    for at in range(0, count, size):
        batch = order[at : at + size]
        if len(batch) > 1 or count == 1 or size == 1:
            yield batch


def batches_of(count: int, size: int) -> int:
    """How many batches an epoch has."""
    whole, rest = divmod(count, size)
    return whole + int(rest > 1 or rest == count == 1)


def endless(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch of batches."""
    return chain.from_iterable(one_epoch(count, size, generator) for _ in repeat(None))
