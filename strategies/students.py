"""Networks at the server that learn from the clients' answers, one for each architecture wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np

from fedkit.data.partitions import Indices
from fedkit.engine.events import Event
from fedkit.engine.strategy import Facts, FederatedStrategy, ServerModels
from fedkit.engine.workers import Workers
from fedkit.errors import UsageError
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.consensus import Consensus
from fedkit.knowledge.reduction import Arrays
from fedkit.settings import FederationSettings
from strategies.distillation import Distilled, Job, distil


class Students:
    """Trains a strategy's students side by side; their weights belong to the strategy's state."""

    def __init__(self, strategy: FederatedStrategy) -> None:
        """Nothing starts yet.

        Args:
            strategy: its hyper-parameters are ``DistilHyperparameters``.

        Raises:
            FedkitError: ``server-device`` is not on this machine.
        """
        from fedkit.models.device import pick_devices

        self._strategy = strategy
        self._workers = Workers(strategy.hyper.workers, strategy.facts.settings.threads)
        self._devices = pick_devices(strategy.hyper.server_device)

    def learn(
        self,
        server_round: int,
        exchange: str,
        students: Mapping[str, Arrays],
        indices: Indices,
        target: Consensus,
        temperature: float,
        *,
        by_moments: bool = False,
    ) -> dict[str, Distilled]:
        """Let every student learn the target (probabilities) on the valid rows of a subset.

        Args:
            server_round, exchange: where it belongs.
            students: by architecture, what each starts from.
            indices: the subset (int64, M).
            target: what the ensemble says on it, softened by ``temperature``.
            temperature: tau of the students' side.
            by_moments: whether they are normalised by the moments of what they learn, see ``Job``.

        Returns:
            By architecture; ``logits`` are the student's on the whole subset (float32, M x C).
        """
        facts = self._strategy.facts
        samples = self._samples(indices[target.valid])
        labels = None if facts.public_labels is None else facts.public_labels[indices[target.valid]]
        jobs = [
            Job(
                spec=spec,
                weights=weights,
                samples=samples,
                targets=target.targets[target.valid],
                labels=labels,
                temperature=temperature,
                hyper=self._strategy.hyper,
                outputs=facts.outputs,
                seed=facts.settings.seed,
                server_round=server_round,
                device=str(device),
                by_moments=by_moments,
            )
            for (spec, weights), device in zip(students.items(), cycle(self._devices), strict=False)
        ]
        learned = dict(zip(students, self._workers.map(distil, jobs), strict=True))
        for spec, done in learned.items():
            for name, value in (
                ("loss", done.loss),
                ("score_before", done.score_before),
                ("score", done.score),
            ):
                self._strategy.emit(
                    Event("metric", server_round, exchange, None, f"student/{spec}/{name}", value,
                          done.steps)
                )  # fmt: skip
        if target.valid.all():
            return learned
        return {
            spec: replace(done, logits=_spread(done.logits, target))
            for spec, done in learned.items()
        }

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def _samples(self, indices: Indices) -> Any:
        import torch

        return self._strategy.facts.public.take(torch.from_numpy(indices))


def answers(
    facts: Facts, spec: str, weights: Arrays, indices: Indices, moments_of: int = 0
) -> Logits:
    """A network's class scores on a public subset (float32, M x C), in evaluation mode.

    Args:
        facts: of the federation.
        spec: the architecture.
        weights: its state dict.
        indices: the subset.
        moments_of: instead of the running statistics in ``weights`` the mean moments of batches of so
            many of these samples; 0: those in ``weights``.
    """
    import torch

    from fedkit.models.build import restored
    from fedkit.models.measure import predict
    from fedkit.models.normalisation import batch_moments

    tensors = {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}
    model = restored(spec, facts.public.shape, facts.outputs, tensors)
    samples = facts.public.take(torch.from_numpy(indices))
    if moments_of:
        batch_moments(model, samples, moments_of)
    logits: Logits = predict(model, samples).numpy()
    return logits


def as_models(students: Mapping[str, Arrays], kind: str = "") -> ServerModels:
    """Students as the server's models, labelled KIND-ARCHITECTURE."""
    label = f"{kind}-" if kind else ""
    return {
        label + spec.replace(":", "-"): (spec, as_record(weights))
        for spec, weights in students.items()
    }


def check_students(settings: FederationSettings, hyper: Any) -> None:
    """Raise ``UsageError`` if students should be scored by labels that are not used."""
    if hyper.score == "val_acc" and not settings.public_labels:
        raise UsageError(
            "score=val_acc needs labels of the public set: set public-labels=true as well, or "
            "score=heldout_kl."
        )


def architectures(wanted: str, here: Sequence[str]) -> list[str]:
    """The students' architectures: those named, else (``auto``) one for each that clients have."""
    if wanted == "auto":
        return sorted(set(here))
    return sorted({name.strip() for name in wanted.split(",") if name.strip()})


def _spread(logits: Logits, target: Consensus) -> Logits:
    whole: Logits = np.zeros((len(target.valid), logits.shape[1]), dtype=np.float32)
    whole[target.valid] = logits
    return whole
