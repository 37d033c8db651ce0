"""Flower's own strategies (``flwr.serverapp.strategy``) by name: ``--strategy flwr:FedAdam``.

What Flower's class does with the clients' models is its own; joining, selection, deadlines, what travels
and the clients are fedkit's, as for FedAvg. Its constructor's numbers are hyper-parameters here
(``-o eta=0.1``), read from its signature, so that whatever Flower ships is there.

Flower trusts what it gets, and adds up in order of arrival. Replies are therefore read as FedAvg's are, and
handed over in client order; what comes back is put into the model's own types. Counters, which are no
weights, take their maximum; running statistics are averaged where the class is a server optimiser, whose
step could make a variance negative, and left to the class where it chooses among clients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from typing import Any, ClassVar

import flwr.serverapp.strategy as flower
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated
from fedkit.errors import UsageError
from fedkit.flower_records import record_in
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.reduction import Arrays, weighted_mean
from fedkit.settings import FederationSettings, Value, key, setting
from strategies.averaging import received_models
from strategies.fedavg import FedAvg, FedAvgHyperparameters, FedAvgState

# Arguments of Flower's constructors that are settings of fedkit's already, and which.
_ELSEWHERE = {
    "fraction_train": "who takes part is --select, as in uniform:0.1",
    "fraction_evaluate": "when clients measure is --eval-every; all of them do",
    "min_train_nodes": "how many clients a round needs is --min-clients",
    "min_evaluate_nodes": "how many clients a round needs is --min-clients",
    "min_available_nodes": "how many clients a round needs is --min-clients",
    "weighted_by_key": "a client's weight is -o weighting=examples or equal",
    "arrayrecord_key": "fedkit's clients know one name for it",
    "configrecord_key": "fedkit's clients know one name for it",
    "train_loss_key": "fedkit's clients know one name for it",
    "eta_l": "the clients' learning rate is -o learning-rate",
    "client_learning_rate": "the clients' learning rate is -o learning-rate",
}
# Which take each entry from the middle of the clients' own, and which give clients no weights.
_BY_ENTRY = (flower.FedMedian, flower.FedTrimmedAvg, flower.Bulyan)
_UNWEIGHTED = (*_BY_ENTRY, flower.Krum, flower.QFedAvg)
# Of a client's reply, what a class of Flower's may read beside the arrays.
LOSS = "train_loss"


@dataclass
class FlowerState(FedAvgState):
    """What is remembered beside FedAvg's: moments and the like, by the names of the class's attributes."""

    kept: dict[str, Any] = field(default_factory=dict)


class FlowerStrategy(FedAvg):
    """What all of Flower's strategies have in common here; a class is made for each."""

    # Flower's class, and the names of its arguments that are hyper-parameters.
    Flower: ClassVar[type[flower.FedAvg]]
    ARGUMENTS: ClassVar[tuple[str, ...]]
    ELSEWHERE: ClassVar[Mapping[str, str]] = {key(name): text for name, text in _ELSEWHERE.items()}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {"default": {}}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FlowerState()

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """One server optimiser, and arguments that Flower's class takes."""
        super().check(settings, hyper)
        if hyper.outer != "none":
            raise UsageError(
                f"flwr:{cls.Flower.__name__} is what the server does with the clients' models: leave outer "
                "at none, or take --strategy fedavg."
            )
        name = f"flwr:{cls.Flower.__name__}"
        if hyper.robust and issubclass(cls.Flower, _UNWEIGHTED):
            raise UsageError(
                f"{name} gives clients no weights, so robust does nothing: leave it out."
            )
        if hyper.update_codec.startswith("topk") and issubclass(cls.Flower, _BY_ENTRY):
            raise UsageError(
                f"{name} compares clients entry by entry, of which topk sends few: the model would hardly "
                "move. Take another update-codec."
            )
        try:
            cls._made(hyper)
        except ValueError as error:
            raise UsageError(
                f"Flower's {cls.Flower.__name__} refuses its settings: {error}"
            ) from None

    @classmethod
    def _made(cls, hyper: Any) -> flower.FedAvg:
        """Flower's strategy as its constructor makes it: everybody takes part who is there."""
        known = inspect.signature(cls.Flower).parameters
        given: dict[str, Any] = {name: getattr(hyper, name) for name in cls.ARGUMENTS}
        for name in known:
            if name in ("eta_l", "client_learning_rate"):
                given[name] = hyper.learning_rate
            elif name.startswith("min_"):
                given[name] = 0  # it would wait for ever for these
        return cls.Flower(**given)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send w, with what Flower's class adds to the config."""
        self._inner = self._made(self.hyper)
        vars(self._inner).update(self.state.kept)
        self._sent_to_inner = ArrayRecord({name: arrays[name] for name in self._moved(arrays)})
        messages = self._inner.configure_train(
            server_round, self._sent_to_inner, self.config(server_round), grid
        )
        self._config = next(
            (message.content.config_records["config"] for message in messages), config
        )
        return super().configure_train(server_round, arrays, config, grid)

    def config_of(self, server_round: int, member: Member) -> ConfigRecord:
        """With what Flower's class has added."""
        return self._config

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """w as Flower's class makes it of the valid replies; it stays where that makes none."""
        losses: dict[int, float] = {}
        received = received_models(
            self,
            server_round,
            self._told(replies, losses),
            lambda member: self._returned,
            self.hyper.weighting,
        )
        told = [one for one in received if one[1]]
        if not told:
            return None, None
        try:
            mine, metrics = self._inner.aggregate_train(
                server_round,
                [self._reply(member, weight, arrays, losses) for member, weight, arrays in told],
            )
            if mine is None:
                raise ValueError(f"it makes none of {len(told)} clients' models")
            new = self._typed(mine)
        except (AppExitException, ValueError, LookupError, ArithmeticError) as error:
            text = f"flwr:{self.Flower.__name__} has no new model, the old one stays: {error}"
            self.emit(Event("warning", server_round, "train", None, text))
            return None, None
        others = weighted_mean(
            (weight, {name: a for name, a in arrays.items() if name not in new})
            for _, weight, arrays in told
        )
        self.state = replace(self.state, kept=_remembered(self._inner))
        return self.travelling.merged(self._global, {**others, **new}), metrics

    def _moved(self, arrays: ArrayRecord) -> list[str]:
        """The tensors that are Flower's business."""
        steps = hasattr(self._inner, "current_arrays")
        travel = self.travelling.up(self.travelling.down(arrays))
        floating = [n for n, a in travel.items() if np.issubdtype(np.dtype(a.dtype), np.floating)]
        return [name for name in floating if name in self.parameters] if steps else floating

    def _told(self, replies: Iterable[Message], losses: dict[int, float]) -> Iterator[Message]:
        """The replies; on the way, the training loss that each tells, by client."""
        for reply in replies:
            for member, content in self.answers([reply]):
                loss = record_in(content, "metrics", MetricRecord).get(LOSS)
                known = isinstance(loss, int | float) and np.isfinite(loss) and loss >= 0
                losses[member.client] = float(loss) if known else 0.0  # type: ignore[arg-type]
            yield reply

    def _reply(
        self, member: Member, weight: float, arrays: Arrays, losses: Mapping[int, float]
    ) -> Message:
        """A valid reply as Flower's classes read it."""
        mine = as_record({name: arrays[name] for name in self._sent_to_inner})
        told = MetricRecord({"num-examples": weight, LOSS: losses[member.client]})
        return Message(RecordDict({"arrays": mine, "metrics": told}), member.node_id, "train")

    def _typed(self, made: ArrayRecord) -> Arrays:
        """What Flower's class made, in the model's types; ``ValueError`` if it is no such model."""
        new: Arrays = {}
        for name, old in self._sent_to_inner.items():
            if name not in made:
                raise ValueError(f"it makes no {name}")
            with np.errstate(over="ignore"):  # what becomes infinite is told below
                values = made[name].numpy().astype(old.dtype)
            if values.shape != tuple(old.shape) or not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite, or of another shape")
            new[name] = values
        return new


def _remembered(inner: flower.FedAvg) -> dict[str, Any]:
    """The arrays among a strategy's attributes, but for the model, which comes anew in each round."""
    return {
        name: value
        for name, value in vars(inner).items()
        if name != "current_arrays" and isinstance(value, dict | list) and value
    }


class _Strategies(Mapping[str, type[FlowerStrategy]]):
    """Flower's strategies that average models, by the names of their classes."""

    def __iter__(self) -> Iterator[str]:
        return iter(_classes())

    def __len__(self) -> int:
        return len(_classes())

    def __getitem__(self, name: str) -> type[FlowerStrategy]:
        return _adapted(_classes()[name])


@cache
def _classes() -> dict[str, type[flower.FedAvg]]:
    found = {name: getattr(flower, name) for name in sorted(flower.__all__)}
    return {
        name: kind
        for name, kind in found.items()
        # Trees are no models that clients of fedkit's train; a wrapper wants another strategy.
        if isinstance(kind, type) and issubclass(kind, flower.FedAvg) and "Xgb" not in name
    }


@cache
def _adapted(kind: type[flower.FedAvg]) -> type[FlowerStrategy]:
    """A strategy of fedkit's that has Flower's class inside."""
    numbers = {
        name: one.default
        for name, one in inspect.signature(kind).parameters.items()
        if name not in _ELSEWHERE and isinstance(one.default, bool | int | float | str)
    }
    declared = [(name, type(default), _setting(kind, name)) for name, default in numbers.items()]
    hyper = make_dataclass(
        f"{kind.__name__}Hyperparameters",
        [*declared, ("preset", str, setting("default", "default: Flower's", choices=("default",)))],
        bases=(FedAvgHyperparameters,),
        frozen=True,
    )
    about = (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")
    body = {
        "__doc__": f"Flower's own: {about}.",
        "Flower": kind,
        "ARGUMENTS": tuple(numbers),
        "Hyperparameters": hyper,
    }
    return type(kind.__name__, (FlowerStrategy,), body)


def _setting(kind: type[flower.FedAvg], name: str) -> Any:
    default = inspect.signature(kind).parameters[name].default
    return setting(default, f"{name} of Flower's {kind.__name__}", source="Flower")


FLOWER: Mapping[str, type[FlowerStrategy]] = _Strategies()
