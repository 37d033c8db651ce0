"""FedSeq (Zaccone et al. 2022, arXiv 2201.10899): models walk through clients, then are averaged.

Once: every client trains a copy of the first model and tells what that then believes of some public
samples, which says which classes the client has (``profile``). Clients are put together to superclients
that have all classes (``superclients``). A round: in every superclient the model goes from one client to
the next, in a random order; the last ones are averaged, weighted by the samples that they saw. Superclients
walk side by side: the first clients of all train at the same time, then the second ones, and so on.

Whoever does not answer is passed over, and the model goes on as it was. With superclients of one
(``group-clients=1``) this is FedAvg to the bit. A round takes as long as its longest walk.

From the authors' code: the score, and how groups are made. Ours: the samples are public ones and not cut
from the test set; without their labels a profile is the mean belief instead of that in the true class; who
comes late is profiled in its first round, and groups are made anew. FedSeqInter is not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, overload

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.errors import UsageError
from fedkit.knowledge import subset
from fedkit.knowledge.arrays import as_arrays, as_record, read_array
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings, Value, setting
from strategies.averaging import average, received_models
from strategies.fedavg import FedAvg, FedAvgHyperparameters, FedAvgState
from strategies.outer import outer_step
from strategies.superclients import superclients


@dataclass(frozen=True)
class FedSeqHyperparameters(FedAvgHyperparameters):
    """FedAvg's hyper-parameters, and how superclients are made; [C] the authors' code."""

    preset: str = setting(
        "default",
        "paper: a fifth of the clients, one epoch, batches of 64; default: all of them, FedAvg's epochs",
        choices=("default", "paper"),
    )
    group_samples: int = setting(
        800,
        "a superclient is complete with so many samples",
        unit="samples",
        minimum=1,
        source="[C] 800",
    )
    group_clients: int = setting(
        11, "or with so many clients; 1: FedAvg", unit="clients", minimum=1, source="[C] 11"
    )
    probe_epochs: int = setting(
        10, "epochs before a client tells its profile", unit="epochs", minimum=0, source="[C] 10"
    )
    exemplars: int = setting(
        100,
        "public samples on which profiles are made (all, if there are fewer)",
        unit="samples",
        minimum=1,
        source="ours",
    )


@dataclass
class FedSeqState(FedAvgState):
    """What FedSeq remembers.

    Attributes:
        profiles: what each client seems to hold of each class (float64, C), by client.
        samples: how many it has.
    """

    profiles: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)


@dataclass
class _Walk:
    """A model on its way through the clients of a superclient.

    Attributes:
        clients: those of the round, in the order of the walk.
        model: as the last client that answered returned it.
        samples: that it has seen, or clients with ``weighting=equal``.
    """

    clients: list[int]
    model: ArrayRecord
    samples: float = 0.0


class FedSeq(FedAvg):
    """FedSeq: models walk through groups of complementary clients, then are averaged (Zaccone 2022)."""

    Hyperparameters = FedSeqHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {"select": "uniform:0.2", "local-epochs": 1, "batch-size": 64},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedSeqState()
        self._walks: list[_Walk] = []
        self.longest = 0

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """A model walks through everybody alike."""
        super().check(settings, hyper)
        if hyper.relevance:
            raise UsageError(
                "In fedseq a client is sent another one's model, which tells no global update to agree "
                "with: leave relevance out."
            )
        if hyper.robust:
            raise UsageError(
                "In fedseq a model walks through every client, whatever its data: leave robust out."
            )

    def exchanges(self) -> Sequence[Exchange]:
        """Profiles of new clients; then a position of all walks after the other."""
        self.longest = self.hyper.group_clients
        return _Positions(self)

    def profile(self) -> Exchange:
        """Ask new clients what they hold."""
        return Exchange("profile", self._configure_profile, self._aggregate_profile, once=True)

    def position(self, at: int) -> Exchange:
        """The clients at one place of all walks train."""
        if not at:
            return Exchange("train", self.configure_train, self.aggregate_train)
        name = f"train-{at + 1}"
        return Exchange(name, partial(self._configure, at), partial(self._aggregate, at))

    def _configure_profile(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        new = [m for m in self.members(grid) if m.client not in self.state.profiles]
        if not new or self.hyper.group_clients == 1:
            return []
        seed, facts = self.facts.settings.seed, self.facts
        exemplars = subset.draw(
            numpy_generator(seed, "exemplars"),
            len(facts.public),
            self.hyper.exemplars,
            strata=facts.public_labels,
        )
        content = RecordDict(
            {
                "arrays": self.initial_arrays(),
                "subset": subset.record(exemplars),
                "config": self.config(server_round),
            }
        )
        return self.instruct(new, "train.profile", server_round, lambda member: content)

    def _aggregate_profile(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        for member, content in self.answers(replies):
            try:
                profile = _profile(content, self.facts.outputs)
            except ValueError as reason:
                self.reject(server_round, "profile", member, reason)
                continue
            self.state.profiles = {**self.state.profiles, member.client: profile}
            self.state.samples = {**self.state.samples, member.client: member.examples}
        return None, None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Set out: a copy of w for every superclient."""
        self._global, sent = arrays, self.travelling.down(arrays)
        here = [member.client for member in self.members(grid)]
        order = numpy_generator(self.facts.settings.seed, "walk", round=server_round)
        walks = [[client for client in group if client in here] for group in self._groups(here)]
        self._walks = [_Walk([*order.permutation(walk).tolist()], sent) for walk in walks if walk]
        self.longest = max((len(walk.clients) for walk in self._walks), default=1)
        return self._configure(0, server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """The models after the first position; the mean, if that is the last one."""
        return self._aggregate(0, server_round, replies)

    def _groups(self, here: Sequence[int]) -> list[list[int]]:
        """The superclients; a client of which no profile is known walks alone."""
        alone = [[client] for client in here if client not in self.state.profiles]
        if not self.state.profiles:
            return alone
        together = superclients(
            self.state.profiles,
            self.state.samples,
            self.hyper.group_samples,
            self.hyper.group_clients,
        )
        return sorted([*together, *alone])

    def _configure(
        self,
        at: int,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Send each walk's model to its client at this position."""
        self._at = {walk.clients[at]: walk for walk in self._walks if at < len(walk.clients)}
        told = self.config(server_round)
        going = [member for member in self.members(grid) if member.client in self._at]

        def content(member: Member) -> RecordDict:
            return RecordDict({"arrays": self._at[member.client].model, "config": told})

        return self.instruct(going, "train", server_round, content)

    def _aggregate(self, at: int, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Take the models over; after the last position, average."""
        received = received_models(
            self,
            server_round,
            replies,
            lambda member: self.travelling.up(self._at[member.client].model),
            self.hyper.weighting,
        )
        for member, weight, model in received:
            walk = self._at[member.client]
            if weight:
                walk.model = self.travelling.merged(walk.model, as_record(model))
                walk.samples += weight
        if at + 1 != self.longest:
            return None, None
        return self._mean(server_round), None

    def _mean(self, server_round: int) -> ArrayRecord | None:
        """The mean of the walks' models, or where ``outer`` leads from w; None: nobody has trained."""
        mean = average((walk.samples, as_arrays(walk.model)) for walk in self._walks)
        told = len(self._walks)
        self.emit(Event("metric", server_round, "train", None, "superclients", told, self.longest))
        if mean is None:
            return None
        after = outer_step(self, server_round, self._global, mean)
        return self.travelling.merged(self._global, after)


class _Positions(Sequence[Exchange]):
    """The exchanges of a round; how many there are is known once the walks are."""

    def __init__(self, strategy: FedSeq) -> None:
        self._strategy = strategy

    def __len__(self) -> int:
        return 1 + self._strategy.longest

    @overload
    def __getitem__(self, at: int) -> Exchange: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Exchange]: ...

    def __getitem__(self, at: int | slice) -> Exchange | Sequence[Exchange]:
        if isinstance(at, slice):
            return [*self][at]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        return self._strategy.position(at - 1) if at else self._strategy.profile()

    def __iter__(self) -> Iterator[Exchange]:
        at = 0
        while at < len(self):
            yield self[at]
            at += 1


def _profile(content: RecordDict, classes: int) -> NDArray[np.float64]:
    """A class distribution that a client told; ``ValueError`` if it is none."""
    record = content.array_records.get("profile")
    if record is None or "profile" not in record:
        raise ValueError("it tells no profile")
    values = read_array("profile", record["profile"])
    if values.shape != (classes,) or values.dtype != np.float32:
        raise ValueError(f"its profile is {values.dtype} {values.shape}, not float32 ({classes},)")
    profile = values.astype(np.float64)
    total = float(profile.sum())
    if not np.isfinite(profile).all() or profile.min() < 0 or not 0.99 < total < 1.01:
        raise ValueError("its profile is no distribution")
    return profile / total
