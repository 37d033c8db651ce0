"""Training before the first round, as an exchange of its own: once in each client's life."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange, FederatedStrategy
from fedkit.engine.workers import Workers
from strategies.pretraining import pretrained


class InitialTraining:
    """Brings new clients in; the strategy's ``state.initialised`` says who has come."""

    def __init__(self, strategy: FederatedStrategy) -> None:
        """``strategy``: its hyper-parameters are ``PretrainHyperparameters``."""
        self._strategy = strategy
        self._workers = Workers(strategy.hyper.workers, strategy.facts.settings.threads)
        self.exchange = Exchange("init", self._configure, self._aggregate, once=True)

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def _configure(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        strategy, hyper = self._strategy, self._strategy.hyper
        known = strategy.state.initialised
        new = [member for member in strategy.members(grid) if member.client not in known]
        weights = {}
        if new and hyper.pretrain == "server" and strategy.facts.public_labels is not None:
            architectures = sorted({member.model for member in new})
            weights = pretrained(strategy.facts, hyper, architectures, self._workers)

        def content(member: Member) -> RecordDict:
            start = {"pretrained": weights[member.model]} if weights else {}
            return RecordDict({"config": strategy.config(server_round), **start})

        return strategy.instruct(new, "train.init", server_round, content)

    def _aggregate(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        state = self._strategy.state
        ready = {member.client for member, _ in self._strategy.answers(replies)}
        state.initialised = sorted({*state.initialised, *ready})
        return None, None
