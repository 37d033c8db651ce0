"""The trainer: batches, steps and epochs, the same on a device and at the server. No messages, no state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from fedkit.data.samples import Samples
from fedkit.models.layerwise import LAMB, LARS
from fedkit.models.losses import Loss


@dataclass(frozen=True)
class Pull:
    """The proximal term mu/2 ||w - w_t||^2 beside a loss (FedProx, Li et al. 2020, eq. 2).

    Its gradient mu (w - w_t) is added to the loss's; with mu = 0 nothing is added, to the bit. Buffers
    are not pulled.

    Attributes:
        mu: its weight; at least 0.
        toward: w_t, one tensor for each parameter, in the order of ``model.parameters()``.
    """

    mu: float
    toward: Sequence[Tensor]

    @staticmethod
    def where(model: nn.Module, mu: float) -> Pull:
        """A pull toward where a model is now."""
        return Pull(mu, [parameter.detach().clone() for parameter in model.parameters()])

    def add_to(self, model: nn.Module) -> None:
        """Add the term's gradient to that of every parameter that has one."""
        if not self.mu:  # 0 * inf is no number
            return
        pairs = zip(model.parameters(), self.toward, strict=True)
        pulled = [(p.grad, p.detach(), w) for p, w in pairs if p.grad is not None]
        if not pulled:
            return
        gradients, here, there = zip(*pulled, strict=True)
        torch._foreach_add_(gradients, torch._foreach_sub(here, there), alpha=self.mu)


@dataclass(frozen=True)
class Steps:
    """One optimiser step for each batch of indices: what ``take_steps`` is asked for.

    Attributes:
        model, samples, loss, optimiser: as in ``train``.
        targets: what ``loss`` wants, n of each.
        batches: of indices of samples.
        clip: bounds the gradient's norm, the pull's share included (0: no bound).
        schedule: steps with the optimiser.
        pull: a proximal term beside the loss.
    """

    model: nn.Module
    samples: Samples
    targets: tuple[Tensor, ...]
    loss: Loss
    optimiser: torch.optim.Optimizer
    batches: Iterable[Tensor]
    clip: float = 0.0
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    pull: Pull | None = None

    def finish_gradients(self) -> None:
        """Pull and clip, once the loss's gradients are there."""
        if self.pull is not None:
            self.pull.add_to(self.model)
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)


def make_optimiser(
    name: str,
    model: nn.Module,
    learning_rate: float,
    *,
    momentum: float = 0.0,
    decay: float = 0.0,
    trust: float = 0.001,
) -> torch.optim.Optimizer:
    """An optimiser over a model's parameters, by name.

    Args:
        name: ``sgd``, ``adam`` (with Keras' epsilon, as FedMD's code), ``adamw``, ``lars`` or ``lamb``.
        model: whose parameters.
        learning_rate: where it begins.
        momentum: of SGD and LARS.
        decay: weight decay; in SGD and Adam a part of the gradient.
        trust: LARS' coefficient eta.
    """
    parameters = list(model.parameters())
    # One pass over memory instead of several: a step of ResNet-18 takes a quarter of the time.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if name == "adam":
        return torch.optim.Adam(
            parameters, lr=learning_rate, eps=1e-7, weight_decay=decay, fused=fused
        )
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=decay, fused=fused)
    if name == "lars":
        return LARS(parameters, learning_rate, momentum, decay, trust)
    if name == "lamb":
        return LAMB(parameters, learning_rate, weight_decay=decay)
    return torch.optim.SGD(
        parameters, lr=learning_rate, momentum=momentum, weight_decay=decay, fused=fused
    )


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
    pull: Pull | None = None,
) -> float:
    """One optimiser step for each batch of indices; returns the mean loss over their samples.

    ``clip`` bounds the gradient's norm, the pull's share included (0: no bound); ``schedule`` steps with
    the optimiser; the loss told is without ``pull``.
    """
    wanted = targets if isinstance(targets, tuple) else (targets,)
    steps = Steps(model, samples, wanted, loss, optimiser, batches, clip, schedule, pull)
    return TAKEN_BY.get()(steps)


def one_by_one(steps: Steps) -> float:
    """Take the steps, here and now; returns the mean loss."""
    model, samples, optimiser = steps.model, steps.samples, steps.optimiser
    model.train()
    device = samples.data.device
    total, seen = torch.zeros((), device=device), 0
    for batch in steps.batches:
        batch = batch.to(device)
        optimiser.zero_grad(set_to_none=True)
        logits = model(samples.training_inputs(batch))
        value = steps.loss(logits, *(target[batch] for target in steps.targets))
        value.backward()  # type: ignore[no-untyped-call]
        steps.finish_gradients()
        optimiser.step()
        if steps.schedule is not None:
            steps.schedule.step()
        total += value.detach() * len(batch)
        seen += len(batch)
    return float(total) / max(seen, 1)


# Who takes the steps that this thread is asked for: whoever trains several models at once is put here.
TAKEN_BY: ContextVar[Callable[[Steps], float]] = ContextVar("TAKEN_BY", default=one_by_one)


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
