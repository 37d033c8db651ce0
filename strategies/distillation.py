"""Distillation at the server: networks of its own learn what an ensemble of clients knows.

No message and no client in here: a job goes in, trained weights come out, so that several students learn
side by side in processes of their own and give the same bits as one after the other.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.reduction import Arrays
from fedkit.settings import setting

if TYPE_CHECKING:
    from torch import nn

    from fedkit.data.samples import Samples


@dataclass(frozen=True)
class DistilHyperparameters:
    """How a network at the server learns from the clients' answers."""

    steps: int = setting(
        150,
        "steps J of a server student each round",
        unit="steps",
        minimum=0,
        source="FedDF: 10000",
    )
    steps_patience: int = setting(
        75,
        "stop after so many steps without a better score (0: never)",
        unit="steps",
        minimum=0,
        source="FedDF: 1000",
    )
    check_every: int = setting(
        25, "score a student every so many steps", unit="steps", minimum=1, source="FedDF: 100"
    )
    score: str = setting(
        "heldout_kl",
        "what picks a student's best weights: KL divergence from the ensemble on held-out rows, "
        "accuracy on them (val_acc, needs public-labels), or none: the last weights",
        choices=("heldout_kl", "val_acc", "last"),
        source="FedDF: val_acc; unlabelled public sets: ours",
    )
    heldout: float = setting(
        0.1,
        "share of the public rows that only score",
        above=0,
        maximum=0.5,
        source="FedDF: 10 % of the training set",
    )
    server_batch: int = setting(
        64, "batch size of a server student", unit="samples", minimum=1, source="FedDF: 128"
    )
    server_rate: float = setting(
        0.001, "its learning rate (Adam, cosine annealing over the steps)", above=0,
        source="FedDF: 0.001",
    )  # fmt: skip
    clip: float = setting(
        5.0, "bound on the norm of its gradient (0: none)", minimum=0, source="FedDF code: 5"
    )
    workers: int = setting(
        0, "processes of the server that train side by side (0: one for each core)", minimum=0
    )
    server_device: str = setting(
        "cpu",
        "where they train: cpu, cuda (all GPUs in turn), cuda:1, mps, or auto, which takes GPUs if any",
    )


@dataclass(frozen=True)
class Job:
    """One student's lesson; all that its result depends on.

    Attributes:
        spec: the student's architecture.
        weights: what it starts from.
        samples: public images, M.
        targets: what the ensemble says (float32, M x C): probabilities, softened by ``temperature``.
        labels: their labels (int64, M) for ``score=val_acc``.
        temperature: tau; the loss is tau^2 KL(targets || softmax(z / tau)).
        hyper: ``DistilHyperparameters``.
        seed, server_round: what the random numbers come from.
        device: where it learns, as torch names it.
        by_moments: track no running statistics; whenever the student is to predict it has the mean
            moments of batches of what it learns from.
    """

    spec: str
    weights: Arrays
    samples: Samples
    targets: Logits
    labels: NDArray[np.int64] | None
    temperature: float
    hyper: Any
    outputs: int
    seed: int
    server_round: int
    device: str = "cpu"
    by_moments: bool = False


@dataclass(frozen=True)
class Distilled:
    """What a lesson brought.

    Attributes:
        weights: the student's best (or last) weights.
        logits: its class scores on all samples of the job (float32, M x C).
        steps: how many were taken.
        loss: mean loss of the last steps.
        score_before, score: of the weights that went in and that came out; higher is better.
    """

    weights: Arrays
    logits: Logits
    steps: int
    loss: float
    score_before: float
    score: float


def distil(job: Job) -> Distilled:
    """J steps of Adam on tau^2 KL(targets || student), the best weights so far kept.

    The weights that went in are a candidate too, so the score never falls; with ``steps=0`` they come
    back to the bit. (Lin et al. 2020, arXiv 2006.07242, algorithm 3; the starting weights as a
    candidate are ours.)
    """
    import torch

    from fedkit.models.build import restored
    from fedkit.models.device import repeatable
    from fedkit.models.losses import kl_divergence
    from fedkit.models.measure import predict
    from fedkit.models.normalisation import batch_moments, untracked
    from fedkit.models.training import endless, make_optimiser, take_steps
    from fedkit.seeds import derive, torch_generator

    hyper, purpose, device = job.hyper, f"distil/{job.spec}", torch.device(job.device)
    repeatable()
    weights = {name: torch.from_numpy(np.array(a)) for name, a in job.weights.items()}
    student = restored(job.spec, job.samples.shape, job.outputs, weights).to(device)
    everything = job.samples.to(device)
    order = torch.randperm(
        len(job.samples), generator=torch_generator(job.seed, purpose, round=job.server_round)
    )
    held = _heldout(job)
    scoring, learning = order[:held].sort().values, order[held:].sort().values
    targets = torch.from_numpy(job.targets).to(device)
    loss = kl_divergence(job.temperature, reduction="batchmean", scale=job.temperature**2)

    samples, wanted = everything.take(learning), targets[learning]

    def score() -> float:
        if job.by_moments:
            batch_moments(student, samples, hyper.server_batch)
        if not held:
            return 0.0
        scores = predict(student, everything.take(scoring))
        if hyper.score == "val_acc" and job.labels is not None:
            right = scores.argmax(dim=1).cpu() == torch.from_numpy(job.labels)[scoring]
            return float(right.double().mean())
        return -float(loss(scores, targets[scoring]))

    first = best = score()
    kept, since, taken, mean = _copy(student), 0, 0, 0.0
    optimiser = make_optimiser("adam", student, hyper.server_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(hyper.steps, 1))
    generator = torch_generator(job.seed, f"{purpose}/order", round=job.server_round)
    batches = endless(len(learning), hyper.server_batch, generator)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(job.seed, purpose, round=job.server_round))
        while taken < hyper.steps and not (hyper.steps_patience and since >= hyper.steps_patience):
            some = list(islice(batches, min(hyper.check_every, hyper.steps - taken)))
            with untracked(student) if job.by_moments else nullcontext():
                mean = take_steps(
                    student,
                    samples,
                    wanted,
                    loss,
                    optimiser,
                    some,
                    clip=hyper.clip,
                    schedule=schedule,
                )
            taken, since = taken + len(some), since + len(some)
            now = score()
            # Without a score the last weights count, unless the student has diverged.
            if now > best or (not held and math.isfinite(mean)):
                best, kept, since = now, _copy(student), 0
    student.load_state_dict(kept)
    return Distilled(
        weights={name: tensor.cpu().numpy() for name, tensor in kept.items()},
        logits=predict(student, everything).cpu().numpy(),
        steps=taken,
        loss=mean,
        score_before=first,
        score=best,
    )


def _heldout(job: Job) -> int:
    """How many rows only score; a single sample is left to learn from in any case."""
    if job.hyper.score == "last" or len(job.samples) < 2:
        return 0
    wanted: int = round(job.hyper.heldout * len(job.samples))
    return min(max(wanted, 1), len(job.samples) - 1)


def _copy(student: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}
