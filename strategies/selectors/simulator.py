"""Federated rounds on emulated devices: real training of small networks on a virtual clock.

Every client is a device with a profile and a trace, and trains a perceptron on its own samples (FedAvg);
what a selector gains or loses in accuracy is therefore measured, not modelled. Only time is: work,
transfers and absences are those of ``fedkit.devices``. A selector sees here what it sees in a real run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedkit.data.datasets import open_dataset
from fedkit.data.partitions import Labelled, deal
from fedkit.devices import clock, device, profiles, traces
from fedkit.devices.clock import VirtualClock
from fedkit.devices.device import Device
from fedkit.devices.settings import SimulationSettings
from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, Seen, Selector, View
from fedkit.errors import UsageError
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings
from strategies.selectors import local_training, perceptrons
from strategies.selectors.local_training import Local, Training, Untrained
from strategies.selectors.perceptrons import Floats, Indices

# So many samples, at most, validate a round, and as many measure it.
MEASURED = 2000
# The server waits for as many times what the slowest device would nominally take for a whole round.
PATIENCE = 2.0


@dataclass(frozen=True)
class Samples:
    """A data set as perceptrons read it.

    Attributes:
        inputs, labels: of the training set, n x features and n.
        val_inputs, val_labels: half of the test set, for decisions.
        test_inputs, test_labels: the other half, for what is reported.
        classes: how many.
    """

    inputs: Floats
    labels: Indices
    val_inputs: Floats
    val_labels: Indices
    test_inputs: Floats
    test_labels: Indices
    classes: int


@dataclass(frozen=True)
class Round:
    """What one round came to.

    Attributes:
        outcome: as the selector was told it (accuracy: on the validation half).
        test_accuracy: on the other half, in [0, 1].
        chosen: who took part or was probed.
    """

    outcome: Outcome
    test_accuracy: float
    chosen: tuple[int, ...]


def read_samples(spec: str, sources: DataSettings) -> Samples:
    """A data set for ``Simulation``.

    Raises:
        UsageError: no such data set, or one that perceptrons can't read or that has no test set.
        FedkitError: its files are missing or damaged.
    """
    dataset = open_dataset(spec, sources)
    if not len(dataset.train.mean) or len(dataset.test) < 2 or len(dataset.classes) < 2:
        raise UsageError(
            f"A simulation needs images or features, classes and a test set, which {spec} has not."
        )
    train, test = dataset.train.all(), dataset.test.all()
    pixels = [
        samples.inputs(slice(None)).reshape(len(samples), -1).numpy() for samples in (train, test)
    ]
    half = min(len(test) // 2, MEASURED)
    order = numpy_generator(0, "simulation's test set").permutation(len(test))
    val, rest = order[:half], order[half : 2 * half]
    answers = test.labels.numpy()
    return Samples(
        pixels[0],
        train.labels.numpy(),
        pixels[1][val],
        answers[val],
        pixels[1][rest],
        answers[rest],
        len(dataset.classes),
    )


def code_digest() -> str:
    """SHA-256 (hex) of the code that simulates, by which a policy says what it was trained on."""
    sha = hashlib.sha256()
    for module in (clock, device, profiles, traces, local_training, perceptrons):
        sha.update(Path(str(module.__file__)).read_bytes())
    sha.update(Path(__file__).read_bytes())
    return sha.hexdigest()


class Simulation:
    """One federation; the same settings give the same numbers."""

    def __init__(self, settings: SimulationSettings, samples: Samples) -> None:
        """A federation before its first round.

        Raises:
            UsageError: no such profile or partition, or too few samples for so many clients.
        """
        self.settings = settings
        self._samples = samples
        seed, kinds = settings.seed, profiles.profiles(settings.profiles)
        dealt = numpy_generator(seed, "simulated samples").permutation(len(samples.labels))
        dealt = np.sort(dealt[: settings.samples])
        parts = deal(
            settings.partition,
            Labelled(samples.labels[dealt]),
            settings.clients,
            numpy_generator(seed, "partition"),
        ).parts
        self._shards = [dealt[part] for part in parts]
        kind_of = numpy_generator(seed, "kinds of devices").permutation(settings.clients)
        self.devices = [
            Device(kinds[kind_of[client] % len(kinds)], seed, client)
            for client in range(settings.clients)
        ]
        self._weights = perceptrons.initial(
            samples.inputs.shape[1],
            settings.hidden,
            samples.classes,
            numpy_generator(seed, "simulated network"),
        )
        self.down_bytes = round(1000 * settings.upload_kb)
        spread = numpy_generator(seed, "sizes of uploads").standard_normal(settings.clients)
        self.up_bytes = [
            round(self.down_bytes * factor) for factor in np.exp(settings.upload_spread * spread)
        ]
        self.members = [self._member(client) for client in range(settings.clients)]
        self._seen = dict.fromkeys(range(settings.clients), Seen())
        self._clock = VirtualClock()
        nominal = [
            self._work(client, settings.epochs, 0.0) + each.up_seconds(self.up_bytes[client], 0.0)
            for client, each in enumerate(self.devices)
        ]
        self.timeout = PATIENCE * max(nominal)

    def full_round(self) -> tuple[float, int]:
        """Seconds and bytes of a round, as it would be at the start, that probes all and drops nobody."""
        probing, rest = 0.0, 0.0
        for client, each in enumerate(self.devices):
            down = each.down_seconds(self.down_bytes, 0.0)
            probing = max(probing, down + self._work(client, 1, 0.0))
            up = each.up_seconds(self.up_bytes[client], 0.0)
            rest = max(rest, self._work(client, self.settings.epochs - 1, 0.0) + up)
        return probing + rest, sum(self.up_bytes)

    def run(self, selector: Selector) -> list[Round]:
        """All rounds with one selector."""
        return [self.round(number, selector) for number in range(1, self.settings.rounds + 1)]

    def round(self, number: int, selector: Selector) -> Round:
        """One round; a selector that picks nobody gets everybody."""
        began = self._wait_for_somebody()
        here = [m for m in self.members if self.devices[m.client].available(began)]
        view = self._view(number, here)
        chosen = sorted(m.client for m in selector.choose(view)) or [m.client for m in here]
        trained = self._training(number, chosen)
        slowest = 0.0
        kept, first = chosen, 0
        if selector.probes:
            probes, slowest = self._probe(number, trained, began)
            going = selector.keep(self._view(number, here), probes)
            kept = sorted(m.client for m in going if m.client in probes) or sorted(probes)
            for client in set(probes) - set(kept):
                self._note(client, rejected=number)
            first = 1
        came, lost, latest = self._finish(number, trained, kept, first, began + slowest)
        if came:
            self._weights = trained.average(came, self.settings.epochs)
        slowest += latest
        self._clock.advance(slowest)
        accuracy, measured = self._accuracies()
        outcome = Outcome(
            round=number,
            accuracy=accuracy,
            seconds=slowest,
            bytes_up=sum(self.up_bytes[client] for client in came),
            kept=tuple(came),
            lost=tuple(lost),
        )
        selector.learn(outcome)
        return Round(outcome, measured, tuple(chosen))

    def _training(self, number: int, chosen: Sequence[int]) -> Training:
        """What those chosen do in a round."""
        inputs, labels = self._samples.inputs, self._samples.labels
        return Local(self.settings, inputs, labels, self._shards, self._weights, number, chosen)

    def _accuracies(self) -> tuple[float, float]:
        """Of the global network, on the validation half and on the other one."""
        weights, samples = self._weights, self._samples
        return (
            perceptrons.accuracy(weights, samples.val_inputs, samples.val_labels),
            perceptrons.accuracy(weights, samples.test_inputs, samples.test_labels),
        )

    def _probe(
        self, number: int, trained: Training, began: float
    ) -> tuple[dict[int, Probe], float]:
        """What those probed tell, and how long the slowest took; the lost take the timeout."""
        probes, slowest = {}, 0.0
        losses = trained.losses(1)
        for client in trained.clients:
            each, seconds = self.devices[client], self._work(client, 1, began)
            whole = each.down_seconds(self.down_bytes, began) + seconds
            if whole > self.timeout or not each.available(began + whole):
                self._note(client, probed=number, probe_seconds=self.timeout, probe_losses=math.nan)
                slowest = self.timeout
                continue
            probes[client] = Probe(losses[client], seconds, self.up_bytes[client])
            self._note(client, probed=number, probe_seconds=seconds, probe_losses=losses[client])
            slowest = max(slowest, whole)
        return probes, slowest

    def _finish(
        self, number: int, trained: Training, kept: Sequence[int], done: int, began: float
    ) -> tuple[list[int], list[int], float]:
        """Who came, who was lost, and how long the slowest took from the epochs ``done`` on."""
        came, lost, slowest = [], [], 0.0
        losses = trained.losses(self.settings.epochs, kept)
        for client in kept:
            each = self.devices[client]
            down = 0.0 if done else each.down_seconds(self.down_bytes, began)
            work = self._work(client, self.settings.epochs - done, began)
            up = each.up_seconds(self.up_bytes[client], began)
            whole = down + work + up
            if whole > self.timeout or not each.available(began + whole):
                lost.append(client)
                self._note(client, missed=number)
                slowest = self.timeout
                continue
            came.append(client)
            slowest = max(slowest, whole)
            probing = self._seen[client].probe_seconds[-1] if done else 0.0
            self._note(
                client,
                rounds=number,
                losses=losses[client],
                seconds=probing + work,
                transfer_seconds=up,
                bytes_up=self.up_bytes[client],
            )
        return came, lost, slowest

    def _work(self, client: int, epochs: int, at: float) -> float:
        count = len(self._shards[client])
        return self.devices[client].work_seconds(count, epochs, self.settings.sample_ms / 1000, at)

    def _wait_for_somebody(self) -> float:
        now = self._clock.now
        if not any(each.available(now) for each in self.devices):
            now = min(each.available_from(now) for each in self.devices)
            if math.isinf(now):
                raise UsageError("No device of these profiles is there within a week.")
            self._clock.advance(now - self._clock.now)
        return now

    def _view(self, number: int, here: Sequence[Member]) -> View:
        generator = numpy_generator(self.settings.seed, "clients", round=number)
        return View(number, here, dict(self._seen), generator, self.settings.rounds)

    def _member(self, client: int) -> Member:
        count = len(self._shards[client])
        return Member(
            node_id=client + 1,
            client=client,
            name=f"client {client} ({self.devices[client].profile.name})",
            model="perceptron",
            examples=count,
            parameters=sum(array.size for array in self._weights),
            device="cpu",
            codecs=(),
        )

    def _note(self, client: int, **more: float) -> None:
        seen = self._seen[client]
        longer = {name: (*getattr(seen, name), value) for name, value in more.items()}
        self._seen[client] = replace(seen, **longer)


class CostsOnly(Simulation):
    """A federation whose networks are not trained: seconds and bytes alone, in milliseconds a round.

    Accuracy stays 0. A loss is drawn anew for each client and round, and so says nothing of either.
    """

    def _training(self, number: int, chosen: Sequence[int]) -> Training:
        return Untrained(self.settings.seed, number, chosen, self._weights)

    def _accuracies(self) -> tuple[float, float]:
        return 0.0, 0.0
