"""What fedkit's strategies share beyond Flower's ``Strategy``: exchanges, members, hyper-parameters.

A round is an ordered list of exchanges; each sends instructions (``configure``) and takes replies
(``aggregate``), like Flower's train verbs. Flower's own strategies have the single exchange ``train``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkit.engine.events import Event, Listener
from fedkit.engine.roster import Member
from fedkit.knowledge.arrays import from_state_dict
from fedkit.settings import FederationSettings, Value, as_config, build, key

if TYPE_CHECKING:
    from torch import nn

    from fedkit.data.samples import Samples

Aggregated: TypeAlias = tuple[ArrayRecord | None, MetricRecord | None]
Traffic: TypeAlias = tuple[int, int]
Configure: TypeAlias = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]
Aggregate: TypeAlias = Callable[[int, Iterable[Message]], Aggregated]
# Networks that the server has: by label, the architecture and the weights.
ServerModels: TypeAlias = Mapping[str, tuple[str, ArrayRecord]]


@dataclass(frozen=True)
class Exchange:
    """One going and coming of messages in a round.

    Attributes:
        name: what it is called in events.
        configure: makes the instructions.
        aggregate: takes the replies.
        once: whether a client has it once in its life, before the work of its first round: a selector's
            probe comes after it.
        trains: whether clients do a round's private training in it; the probe is the beginning of that.
    """

    name: str
    configure: Configure
    aggregate: Aggregate
    once: bool = False
    trains: bool = True


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of its federation.

    Attributes:
        settings: the federation's settings.
        outputs: number of logits, C.
        public: the public set (M0 images), at the server.
        public_digest: its SHA-256 (hex).
        public_labels: its labels (int64 array, M0), numbered as the networks' outputs are, if the
            federation uses them.
        pool: the private training samples of some shards, as the server could cut them: for a reference
            line that no federation could reach. Corrupt clients' are whole here.
    """

    settings: FederationSettings
    outputs: int
    public: Samples
    public_digest: str
    public_labels: Any
    pool: Callable[[Sequence[int]], Samples]

    def initial_weights(self, spec: str) -> ArrayRecord:
        """The weights with which a network that belongs to nobody in particular starts."""
        from fedkit.models.build import build_model

        seed = self.settings.seed
        model = build_model(spec, self.public.shape, self.outputs, seed)
        return from_state_dict(model.state_dict())


class NetworkSize(NamedTuple):
    """What a network weighs.

    Attributes:
        bytes: of its state dict.
        parameters: shapes of the tensors that training moves, in float32, but for ``normalisation``.
        normalisation: shapes of those of them that belong to normalisation layers.
        statistics: bytes of batch normalisation's running statistics.
    """

    bytes: int
    parameters: tuple[tuple[int, ...], ...] = ()
    normalisation: tuple[tuple[int, ...], ...] = ()
    statistics: int = 0


class Sizes(NamedTuple):
    """What the bytes of a round hang on.

    Attributes:
        own: the client's own network.
        common: the federation's ``model``.
        outputs: number of logits, C.
        public: size of the public set, M0.
        codec: how logits travel.
    """

    own: NetworkSize
    common: NetworkSize
    outputs: int
    public: int
    codec: str


class FederatedStrategy(Strategy):
    """A strategy of fedkit's: Flower's verbs, over the members that the driver's grid offers."""

    Hyperparameters: ClassVar[type]
    # What a preset changes: hyper-parameters and federation settings by outside name.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]]
    # Names that people may look for among its hyper-parameters, and which setting does that here.
    ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    # Whether all clients train one architecture, the federation's `model`.
    one_model: ClassVar[bool] = False
    # Whether a client may train the first channels of every layer of it only (`--width`).
    by_width: ClassVar[bool] = False
    # Whether a client may train the first stages of that network only (`--depth`).
    by_depth: ClassVar[bool] = False
    # What a strategy remembers from round to round: a dataclass that `strategy_state` can save.
    state: Any = None

    def __init__(self, hyper: Any, facts: Facts, emit: Listener) -> None:
        self.hyper = hyper
        self.facts = facts
        self.emit = emit
        self._members: dict[int, Member] = {}

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the tensors of the federation's ``model`` that training moves."""
        from fedkit.models.build import parameter_names

        facts = self.facts
        return parameter_names(facts.settings.model, facts.public.shape, facts.outputs)

    def parameters_of(self, member: Member) -> frozenset[str]:
        """Names of the tensors of the network that a member is sent and trains, as ``parameters``."""
        return self.parameters

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Raise ``UsageError`` for settings that make no sense together."""

    def why_not(self, facts: ConfigRecord) -> str | None:
        """Why a client that says this of itself at join can't take part, or None."""
        return None

    def exchanges(self) -> Sequence[Exchange]:
        """The exchanges of a round, in order."""
        return [Exchange("train", self.configure_train, self.aggregate_train)]

    def before_evaluate(self) -> Sequence[Exchange]:
        """Exchanges that come before every measuring, with all who measure; none, for most."""
        return []

    def initial_arrays(self) -> ArrayRecord:
        """The global model before the first round; empty where there is none."""
        return ArrayRecord()

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The networks that live at the server, to be measured and saved.

        Args:
            arrays: the global model, as it went through the rounds.
        """
        return {}

    def measured(self, label: str, model: nn.Module, test: Samples) -> Mapping[str, float]:
        """What else is recorded of one of those networks on the common test set, by a metric's name."""
        return {}

    @staticmethod
    def network(model: str, depth: int | None = None) -> str:
        """The network that a client trains, of the federation's (or its own) ``model``.

        ``depth``: how many stages of it, where the strategy is ``by_depth``.
        """
        return model

    @staticmethod
    def width(
        hyper: Any, settings: FederationSettings, client: int, told: float | None
    ) -> float | None:
        """The most of its channels that a client trains which says ``told``; None: all of them."""
        return told

    def close(self) -> None:
        """The run is over: let go of what the strategy holds (worker processes)."""

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """Tensor bytes a client sends up and takes down in a round, as ``--dry-run`` prints."""
        raise NotImplementedError("a strategy tells what it sends")

    def config(self, server_round: int) -> ConfigRecord:
        """What goes with every instruction: the round and all hyper-parameters."""
        config = self._hyper_config.copy()
        config["server-round"] = server_round
        return config

    @cached_property
    def _hyper_config(self) -> ConfigRecord:
        # Flower looks into each value of a new one, and each client is told all of them.
        return ConfigRecord({**as_config(self.hyper)})

    def members(self, grid: Grid) -> Sequence[Member]:
        """Who takes part in this round, in client order."""
        members: Sequence[Member] = grid.members  # type: ignore[attr-defined]
        return members

    def learners(self, grid: Grid, told: Collection[int]) -> list[Member]:
        """Of this round's members those whose answers count (``told``: client indices), in client order.

        And those that were stopped early, who told nothing but may learn from the others.
        """
        stopped: Collection[int] = getattr(grid, "stopped", ())
        return [m for m in self.members(grid) if m.client in told or m.client in stopped]

    def instruct(
        self,
        members: Sequence[Member],
        kind: str,
        server_round: int,
        content: Callable[[Member], RecordDict],
    ) -> Iterator[Message]:
        """One instruction of type ``kind`` for each member, made only when it is sent."""
        self._members = {member.node_id: member for member in members}
        for member in members:
            yield Message(content(member), member.node_id, kind, group_id=str(server_round))

    def answers(self, replies: Iterable[Message]) -> Iterator[tuple[Member, RecordDict]]:
        """The replies that carry content, with the member that each came from, as they come."""
        for reply in replies:
            if reply.has_content() and reply.metadata.src_node_id in self._members:
                yield self._members[reply.metadata.src_node_id], reply.content

    def reject(self, server_round: int, exchange: str, member: Member, reason: object) -> None:
        """Leave a reply out and say why; the round goes on with the others."""
        text = f"the reply of {member.name} was left out: {reason}"
        self.emit(Event("warning", server_round, exchange, member.client, text, "rejected"))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure its models (and the global one, where there is one)."""
        content = RecordDict({"config": config})
        if arrays:
            content["arrays"] = arrays
        return self.instruct(self.members(grid), "evaluate", server_round, lambda member: content)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means over the clients that measured something; the driver records each client's own."""
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for _, content in self.answers(replies):
            for record in content.metric_records.values():
                for name, value in record.items():
                    if isinstance(value, int | float):
                        sums[name] += value
                        counts[name] += 1
        return MetricRecord({name: sums[name] / counts[name] for name in sums}) if sums else None

    def summary(self) -> None:
        """Nothing to log: the run directory holds every setting."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the strategy over any Flower grid; fedkit's driver drives it on every engine.

        Args:
            grid: where the clients are.
            initial_arrays: the global model's weights; empty takes the strategy's own.
            num_rounds: how many rounds.
            timeout: seconds for a whole round.
            train_config, evaluate_config: must be None; hyper-parameters take their place.
            evaluate_fn: measures the global model at the server.

        Raises:
            ValueError: a config was given.
        """
        from fedkit.engine.driver import Driver

        if train_config or evaluate_config:
            raise ValueError("fedkit's strategies take hyper-parameters, not configs")
        settings = replace(self.facts.settings, rounds=num_rounds, round_timeout=timeout)
        driver = Driver(self, grid, settings, self.emit, evaluate_fn=evaluate_fn)
        return driver.run(initial_arrays or self.initial_arrays())


def exchanges_of(strategy: Strategy) -> Sequence[Exchange]:
    """The exchanges of any Flower strategy."""
    if isinstance(strategy, FederatedStrategy):
        return strategy.exchanges()
    return [Exchange("train", strategy.configure_train, strategy.aggregate_train)]


def build_hyperparameters(kind: type[FederatedStrategy], values: Mapping[str, Value]) -> Any:
    """A strategy's hyper-parameters: its defaults, then its preset's, then ``values``.

    Raises:
        UsageError: an unknown preset or a value out of range.
    """
    chosen: Any = build(kind.Hyperparameters, values)  # checks the preset's name too
    own = {key(item.name) for item in fields(kind.Hyperparameters)}
    preset = {k: v for k, v in kind.PRESETS[chosen.preset].items() if k in own}
    return build(kind.Hyperparameters, {**preset, **values})
