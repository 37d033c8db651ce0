"""DepthFL (Kim et al. 2023): one network with an exit after each stage, of which each trains what it can.

The network ``model`` gets a small exit after each of its D stages. A client of depth d holds the first d
stages and exits; only they travel, both ways. It trains its exits jointly, on labels and on each other
(``fedkit.models.exit_loss``). Each tensor becomes the mean over the clients of the round that hold it, and
stays where none does. With clients of one depth this is FedAvg on the network of that depth.
A client may be narrow as well: of what it holds it is sent the first channels, as in HeteroFL.
What follows the paper's code, and what does not: docs/depth.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.events import Event, Listener
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Exchange, Facts, ServerModels
from fedkit.errors import FedkitError, UsageError
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.held import HeldMean, Indices, open_mesh
from fedkit.models.exit_loss import read_weights
from fedkit.models.exits import MultiExit, held_at
from fedkit.models.slicing import Slicing, slicing_of
from fedkit.settings import FederationSettings, Value, setting
from strategies.averaging import received_models
from strategies.fedavg import FedAvg, FedAvgHyperparameters, FedAvgState
from strategies.level_norm import LevelNorm, LevelState
from strategies.outer import outer_step

if TYPE_CHECKING:
    from torch import nn

    from fedkit.data.samples import Samples


@dataclass(frozen=True)
class DepthFLHyperparameters(FedAvgHyperparameters):
    """DepthFL's hyper-parameters."""

    preset: str = setting(
        "default",
        "code: the values of the authors' code, without its dynamic regularisation; branchynet: exits do "
        "not teach each other",
        choices=("default", "code", "branchynet"),
    )
    exit_weights: str = setting(
        "1",
        "weight of each exit's cross-entropy, the first exit's first, as in 0.3,0.3,1; the last for all "
        "exits that follow",
        source="DepthFL: 1",
    )
    distillation: float = setting(
        1.0,
        "weight of what exits learn from each other (0: nothing)",
        minimum=0,
        source="DepthFL: 1; BranchyNet: 0",
    )
    temperature: float = setting(
        1.0, "temperature at which they do", above=0, source="DepthFL code: 1"
    )
    ramp_up: int = setting(
        0,
        "the weight of distillation rises from nearly 0 over so many rounds (0: it does not)",
        unit="rounds",
        minimum=0,
        source="DepthFL code: 300",
    )
    exit_entropy: float = setting(
        0.5,
        "the server also measures prediction in which a sample leaves by the first exit whose entropy "
        "is below this share of the largest",
        minimum=0,
        maximum=1,
        source="BranchyNet: below a threshold T; the value is ours",
    )


@dataclass
class DepthFLState(FedAvgState, LevelState):
    """What DepthFL remembers: as FedAvg, and the statistics of each width in use."""


class DepthFL(FedAvg):
    """DepthFL: clients train the first stages of one network, each with an exit (Kim et al. 2023)."""

    Hyperparameters = DepthFLHyperparameters
    by_depth = by_width = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "code": {
            "select": "uniform:0.1",
            "weighting": "equal",
            "batch-size": 50,
            "learning-rate": 0.1,
            "weight-decay": 0.001,
            "schedule": "step",
            "schedule-factor": 0.998,
            "schedule-patience": 1,
            "ramp-up": 300,
        },
        "branchynet": {"distillation": 0.0},
    }

    def __init__(self, hyper: Any, facts: Facts, emit: Listener) -> None:
        network = self.network(facts.settings.model)
        super().__init__(
            hyper, replace(facts, settings=replace(facts.settings, model=network)), emit
        )
        self.state = DepthFLState()
        self._norm = LevelNorm(self, self.travelling, _width, self._held)

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Weights that there are, and one model to be measured."""
        super().check(settings, hyper)
        read_weights(hyper.exit_weights)
        if hyper.finetune_epochs:
            raise UsageError(
                "depthfl measures the parts of the global network: leave finetune-epochs at 0."
            )

    @staticmethod
    def network(model: str, depth: int | None = None) -> str:
        """The network that a client trains: the first stages of ``model``, or all of it."""
        return f"exits:{model}" if depth is None else f"exits:{depth}:{model}"

    def why_not(self, facts: ConfigRecord) -> str | None:
        """Why a client can't be as narrow as it says, or None."""
        width = facts.get("width")
        try:
            if isinstance(width, float) and width < 1:
                self._slicing.indices(width)
        except FedkitError as error:
            return str(error)
        return None

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The global network with its exits; none whose statistics nobody keeps here, or has told yet."""
        return super().server_models(self._norm.told(arrays, 1.0)) if self._norm.known(1.0) else {}

    def before_evaluate(self) -> Sequence[Exchange]:
        """With static statistics, gather them for every width."""
        return self._norm.exchanges()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each the part of w that it holds."""
        self._global, told = arrays, self.config(server_round)
        members = self.members(grid)
        if server_round == 1:
            self._tell_untrained(arrays, members)
        sent = self._parts(arrays, members)
        self._returns = {size: self.travelling.up(part) for size, part in sent.items()}
        return self.instruct(
            members,
            "train",
            server_round,
            lambda member: RecordDict({"arrays": sent[_size(member)], "config": told}),
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Each tensor <- sum_k a_k w_k / sum_k a_k over those who hold it; held by none: as it was."""
        received = received_models(
            self,
            server_round,
            replies,
            lambda member: self._returns[_size(member)],
            self.hyper.weighting,
        )
        mean, any_came = HeldMean(as_arrays(self._global)), False
        for member, weight, model in received:
            mean.add(weight, model, self._indices(_width(member)))
            any_came = any_came or weight > 0
        if not any_came:
            return None, None
        after = outer_step(self, server_round, self._global, as_record(mean.result()))
        return self.travelling.merged(self._global, after), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure the part of the global network that it holds, by its last exit."""
        members = self.members(grid)
        parts = self._parts(arrays, members)
        return self.instruct(
            members,
            "evaluate",
            server_round,
            lambda member: RecordDict({"arrays": parts[_size(member)], "config": config}),
        )

    def measured(self, label: str, model: nn.Module, test: Samples) -> Mapping[str, float]:
        """How each exit does, and prediction that leaves by the first exit that is sure."""
        from fedkit.models.early_exit import measure_exits

        assert isinstance(model, MultiExit), "the one network that this server has"
        return measure_exits(model, test, self.hyper.exit_entropy)

    def _tell_untrained(self, arrays: ArrayRecord, members: Sequence[Member]) -> None:
        """Warn of exits that nobody trains: the global network leaves by the last one."""
        depths = [member.depth for member in members if member.depth is not None]
        deepest = max(depths, default=0)
        if depths and len(held_at(deepest, arrays)) < len(arrays):
            text = (
                f"no client of the first round holds more than {deepest} stages of the network: what lies "
                f"behind is not trained, so look at exit-{deepest} and not at global"
            )
            self.emit(Event("warning", 1, "train", None, text))

    def _parts(
        self, arrays: ArrayRecord, members: Iterable[Member]
    ) -> dict[tuple[int | None, float], ArrayRecord]:
        """What travels of w to members of each size, with the statistics of its width."""
        down = self.travelling.down(arrays)
        sizes = dict.fromkeys(map(_size, members))
        return {
            (depth, width): self._norm.told(self._held(down, depth, width), width)
            for depth, width in sizes
        }

    def _held(self, arrays: ArrayRecord, depth: int | None, width: float) -> ArrayRecord:
        """The tensors of the first stages (None: of all), and of these the channels of a width."""
        names, indices = (
            list(arrays) if depth is None else held_at(depth, arrays),
            self._indices(width),
        )
        if indices is None:
            return ArrayRecord({name: arrays[name] for name in names})
        whole = {name: arrays[name].numpy() for name in names}
        return as_record({n: a[open_mesh(indices[n], a.shape)] for n, a in whole.items()})

    def _indices(self, width: float) -> Mapping[str, Indices] | None:
        """Where a narrow network's channels lie in each tensor; None: it has all."""
        return None if width == 1 else self._slicing.indices(width)

    @property
    def _slicing(self) -> Slicing:
        facts = self.facts
        return slicing_of(facts.settings.model, tuple(facts.public.shape), facts.outputs)


def _width(member: Member) -> float:
    return 1.0 if member.width is None else member.width


def _size(member: Member) -> tuple[int | None, float]:
    return member.depth, _width(member)
