"""Prediction that ends early: a sample leaves by the first exit that is sure enough of it.

An exit is sure when the entropy of its softmax is below a threshold (BranchyNet, Teerapittayanon et al.
2016, algorithm 1), here one threshold for all exits, as a share of the largest entropy there is, log C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fedkit.data.samples import Samples
from fedkit.models.exits import MultiExit
from fedkit.models.measure import batch_on, quality


@dataclass(frozen=True)
class Left:
    """How some samples have left a network.

    Attributes:
        logits: of the exit that each left by (float32, n x C).
        exits: which that was, counted from 1 (int64, n).
    """

    logits: Tensor
    exits: Tensor

    def shares(self, depth: int) -> list[float]:
        """The share of samples that left by each of ``depth`` exits; they sum to 1."""
        counts = torch.bincount(self.exits, minlength=depth + 1)[1:]
        return (counts.double() / len(self.exits)).tolist()


@torch.inference_mode()
def leave_early(model: MultiExit, samples: Samples, threshold: float) -> Left:
    """Predict in evaluation mode; the batch that goes on shrinks as samples leave.

    Args:
        model: a network with several exits.
        samples: n samples.
        threshold: of the entropy, from 0 to 1. At 0 all samples go to the last exit, at 1 all leave by
            the first.
    """
    model.eval()
    size = batch_on(samples.data.device)
    parts = [
        _leave(model, samples.inputs(slice(at, at + size)), threshold)
        for at in range(0, len(samples), size)
    ]
    return Left(
        torch.cat([part.logits for part in parts]), torch.cat([part.exits for part in parts])
    )


@torch.inference_mode()
def predict_all(model: MultiExit, samples: Samples) -> Tensor:
    """The logits of every exit in evaluation mode (float32, D x n x C), in one pass."""
    model.eval()
    size = batch_on(samples.data.device)
    parts = (samples.inputs(slice(at, at + size)) for at in range(0, len(samples), size))
    return torch.cat([model.every_exit(part) for part in parts], dim=1)


@torch.inference_mode()
def costs(model: MultiExit, sample: Tensor) -> list[int]:
    """Multiply-adds of a sample that leaves by each exit, with those of the exits that it passed.

    Args:
        model: a network with several exits.
        sample: one that it reads (1 x ...).
    """
    model.eval()
    each = []
    with FlopCounterMode(display=False) as counter:
        features = model.stem(sample)
        for stage, leave in zip(model.stages, model.exits, strict=True):
            features = stage(features)
            leave(features)
            each.append(counter.get_total_flops() // 2)
    return each


def measure_exits(model: MultiExit, samples: Samples, threshold: float) -> dict[str, float]:
    """How a network does by each exit, and leaving early, on some samples (at least one).

    Named as measurements are: ``exit-1_model/global_test/accuracy``, ``loss`` and ``n`` for each exit, and
    for ``adaptive_model``, which leaves early, its mean multiply-adds a sample and the share of samples
    that left by each exit as well.
    """
    by_exit, left = predict_all(model, samples), leave_early(model, samples, threshold)
    shares, each = left.shares(model.depth), costs(model, samples.inputs(slice(0, 1)))
    measured = {f"exit-{at}": logits for at, logits in enumerate(by_exit, start=1)}
    metrics: dict[str, float] = {}
    for label, logits in {**measured, "adaptive": left.logits}.items():
        prefix = f"{label}_model/global_test"
        metrics[f"{prefix}/accuracy"], metrics[f"{prefix}/loss"] = quality(logits, samples.labels)
        metrics[f"{prefix}/n"] = len(samples)
    mean = sum(share * cost for share, cost in zip(shares, each, strict=True))
    metrics["adaptive_model/global_test/multiply_adds"] = mean
    for at, share in enumerate(shares, start=1):
        metrics[f"adaptive_model/global_test/exit-{at}_share"] = share
    return metrics


def _leave(model: MultiExit, inputs: Tensor, threshold: float) -> Left:
    features = model.stem(inputs)
    here = torch.arange(len(inputs), device=inputs.device)
    found, number = None, torch.empty_like(here)
    for at, (stage, leave) in enumerate(zip(model.stages, model.exits, strict=True), start=1):
        features = stage(features)
        logits = leave(features)
        found = logits.new_empty((len(inputs), logits.shape[1])) if found is None else found
        sure = (
            _sure(logits, threshold)
            if at < model.depth
            else torch.ones_like(here, dtype=torch.bool)
        )
        found[here[sure]], number[here[sure]] = logits[sure], at
        features, here = features[~sure], here[~sure]
        if not len(here):
            break
    assert found is not None, "there is an exit"
    return Left(found, number)


def _sure(logits: Tensor, threshold: float) -> Tensor:
    """Which rows leave here (bool, n)."""
    if threshold >= 1:
        # The entropy of equal class scores is the largest there is, and not below it.
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    logarithms = functional.log_softmax(logits, dim=1)
    entropy = -(logarithms.exp() * logarithms).sum(dim=1)
    return entropy < threshold * math.log(logits.shape[1])
