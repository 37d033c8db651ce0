"""Federated rounds on emulated devices: real training of small networks on a virtual clock.

Every client is a device with a profile and a trace, and trains a perceptron on its own samples (FedAvg);
what a selector gains or loses in accuracy is therefore measured, not modelled. Only time is: work,
transfers and absences are those of ``fedkit.devices``. A selector sees here what it sees in a real run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedkit.data.partitions import Labelled, deal
from fedkit.devices import clock, device, profiles, traces
from fedkit.devices.clock import VirtualClock
from fedkit.devices.device import Device
from fedkit.devices.settings import SimulationSettings
from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, Seen, Selector, View
from fedkit.errors import UsageError
from fedkit.seeds import numpy_generator
from strategies.selectors import local_training, perceptrons
from strategies.selectors.local_training import Local, Training, Untrained
from strategies.selectors.perceptrons import Floats, Indices, Weights
from strategies.selectors.samples import Samples

# The server waits for as many times what the slowest device would nominally take for a whole round.
PATIENCE = 2.0


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


def code_digest() -> str:
    """SHA-256 (hex) of the code that simulates, by which a policy says what it was trained on."""
    sha = hashlib.sha256()
    modules = (clock, device, profiles, traces, local_training, perceptrons)
    here = Path(__file__)
    for path in (
        *(Path(str(module.__file__)) for module in modules),
        here.with_name("samples.py"),
        here,
    ):
        sha.update(path.read_bytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class _End:
    """How a client's round ends: seconds of work and of sending, of all, and whether it came in time."""

    work: float
    up: float
    whole: float
    came: bool


class Simulation:
    """One federation; the same settings give the same numbers."""

    def __init__(
        self,
        settings: SimulationSettings,
        samples: Samples,
        beside: Callable[[Outcome], None] | None = None,
    ) -> None:
        """A federation before its first round.

        Args:
            settings: of the federation.
            samples: that it has.
            beside: is told, before the selector hears of a round with a probe, what it would have come to
                if everybody had gone on: the same networks, orders of data and traces.

        Raises:
            UsageError: no such profile or partition, or too few samples for so many clients.
        """
        self.settings = settings
        self._samples, self._beside = samples, beside
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
        seen = dict(self._seen)
        view = self._view(number, here, seen)
        chosen = sorted(m.client for m in selector.choose(view)) or [m.client for m in here]
        trained = self._training(number, chosen)
        probing, kept, done = 0.0, chosen, 0
        if selector.probes:
            probes, probing = self._probe(number, trained, began)
            going = selector.keep(self._view(number, here, seen), probes)
            kept = sorted(m.client for m in going if m.client in probes) or sorted(probes)
            for client in set(probes) - set(kept):
                self._note(client, rejected=number)
            done = 1
            if self._beside is not None:
                everybody = self._ends(sorted(probes), done, began + probing)
                self._beside(self._outcome(number, trained, everybody, probing)[0])
        ends = self._ends(kept, done, began + probing)
        self._take_note(number, trained, ends, done)
        outcome, self._weights = self._outcome(number, trained, ends, probing)
        self._clock.advance(outcome.seconds)
        measured = self._accuracy(
            self._weights, self._samples.test_inputs, self._samples.test_labels
        )
        selector.learn(outcome)
        return Round(outcome, measured, tuple(chosen))

    def _training(self, number: int, chosen: Sequence[int]) -> Training:
        """What those chosen do in a round."""
        inputs, labels = self._samples.inputs, self._samples.labels
        return Local(self.settings, inputs, labels, self._shards, self._weights, number, chosen)

    def _accuracy(self, weights: Weights, inputs: Floats, labels: Indices) -> float:
        """Of a global network, on one of the halves."""
        return perceptrons.accuracy(weights, inputs, labels)

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

    def _ends(self, kept: Sequence[int], done: int, at: float) -> dict[int, _End]:
        """How the round ends for each of those that go on from the epochs ``done``."""
        ends = {}
        for client in kept:
            each = self.devices[client]
            down = 0.0 if done else each.down_seconds(self.down_bytes, at)
            work = self._work(client, self.settings.epochs - done, at)
            up = each.up_seconds(self.up_bytes[client], at)
            whole = down + work + up
            in_time = whole <= self.timeout and each.available(at + whole)
            ends[client] = _End(work, up, whole, in_time)
        return ends

    def _outcome(
        self, number: int, trained: Training, ends: Mapping[int, _End], probing: float
    ) -> tuple[Outcome, Weights]:
        """What the round comes to, and the network after it; who is lost costs the timeout."""
        came = [client for client, end in ends.items() if end.came]
        lost = [client for client, end in ends.items() if not end.came]
        trained.losses(self.settings.epochs, list(ends))
        weights = trained.average(came) if came else self._weights
        slowest = self.timeout if lost else max((end.whole for end in ends.values()), default=0.0)
        samples = self._samples
        outcome = Outcome(
            round=number,
            accuracy=self._accuracy(weights, samples.val_inputs, samples.val_labels),
            seconds=probing + slowest,
            bytes_up=sum(self.up_bytes[client] for client in came),
            kept=tuple(came),
            lost=tuple(lost),
        )
        return outcome, weights

    def _take_note(
        self, number: int, trained: Training, ends: Mapping[int, _End], done: int
    ) -> None:
        """What the server sees of those that went on."""
        losses = trained.losses(self.settings.epochs, list(ends))
        for client, end in ends.items():
            if not end.came:
                self._note(client, missed=number)
                continue
            probing = self._seen[client].probe_seconds[-1] if done else 0.0
            self._note(
                client,
                rounds=number,
                losses=losses[client],
                seconds=probing + end.work,
                transfer_seconds=end.up,
                bytes_up=self.up_bytes[client],
            )

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

    def _view(self, number: int, here: Sequence[Member], seen: Mapping[int, Seen]) -> View:
        generator = numpy_generator(self.settings.seed, "clients", round=number)
        return View(number, here, seen, generator, self.settings.rounds)

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

    def _accuracy(self, weights: Weights, inputs: Floats, labels: Indices) -> float:
        return 0.0
