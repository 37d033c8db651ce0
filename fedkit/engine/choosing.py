"""The run's selector, asked so that nothing that it does or fails to do stalls a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fedkit.engine.checkpoint import Checkpoint
from fedkit.engine.events import Event, Listener
from fedkit.engine.registered import among
from fedkit.engine.roster import Member
from fedkit.engine.seen import Ledger
from fedkit.engine.selection import Outcome, Probe, Selector, View
from fedkit.engine.strategy_state import check_state
from fedkit.errors import FedkitError
from fedkit.registry import load, split
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings


class Chooser:
    """Asks the selector; where it picks nobody, or raises, everybody is picked, with a warning."""

    def __init__(self, settings: FederationSettings, seen: Ledger, emit: Listener) -> None:
        """The chooser of a run.

        Args:
            settings: the federation's; ``select`` names the selector.
            seen: what is known of each client.
            emit: takes warnings.
        """
        self._spec, self._settings = settings.select, settings
        name, argument = split(settings.select)
        self.selector: Selector = load("selectors", name)(argument)
        self._seen, self._emit = seen, emit
        # A round that is repeated decides nobody's case anew: who was stopped has let go of its work.
        self._decided: dict[int, bool] = {}

    def begin_round(self) -> None:
        """A round begins, for the first time."""
        self._decided.clear()

    def probes(self, server_round: int) -> bool:
        """Whether the selector wants clients probed in this round; not where it can't say."""
        try:
            return bool(self.selector.probes)
        except Exception as error:  # whatever a plug-in raises
            self._warn(
                server_round, f"--select {self._spec} failed: {_sentence(error)}: nobody is probed"
            )
            return False

    def choose(self, server_round: int, members: Sequence[Member]) -> list[Member]:
        """Who takes part (or is probed), in client order."""
        view = self._view(server_round, members, "clients")
        return self._picked(server_round, members, lambda: self.selector.choose(view), "takes part")

    def keep(
        self, server_round: int, probed: Sequence[Member], probes: Mapping[int, Probe]
    ) -> list[Member]:
        """Who goes on after the probe, in client order."""
        open_cases = [member for member in probed if member.client not in self._decided]
        if open_cases:
            view = self._view(server_round, probed, "clients kept")
            asked = lambda: self.selector.keep(view, probes)  # noqa: E731
            kept = {m.client for m in self._picked(server_round, probed, asked, "goes on")}
            self._decided |= {m.client: m.client in kept for m in open_cases}
        return [member for member in probed if self._decided[member.client]]

    def learn(self, outcome: Outcome) -> None:
        """Tell the selector how the round went."""
        try:
            self.selector.learn(outcome)
        except Exception as error:  # whatever a plug-in raises
            self._warn(outcome.round, f"--select {self._spec} did not learn: {_sentence(error)}")

    def remembered(self, server_round: int) -> Any:
        """The selector's state for a checkpoint; None where it has none that can be kept."""
        try:
            state = getattr(self.selector, "state", None)
            if state is not None:
                check_state(state)
            return state
        except Exception as error:  # whatever a plug-in raises
            self._warn(
                server_round,
                f"--select {self._spec} is not kept in the checkpoint: {_sentence(error)}: a run that is "
                "resumed begins with it anew",
            )
            return None

    def recall(self, checkpoint: Checkpoint) -> None:
        """Let the selector go on from where a checkpoint has it, if it has a state."""
        try:
            state = getattr(self.selector, "state", None)
            if state is not None:
                self.selector.state = checkpoint.selector_state(type(state))  # type: ignore[attr-defined]
        except Exception as error:  # whatever a plug-in raises, or left out of the checkpoint
            self._warn(
                checkpoint.progress.round, f"--select {self._spec} begins anew: {_sentence(error)}"
            )

    def _view(self, server_round: int, members: Sequence[Member], purpose: str) -> View:
        return View(
            round=server_round,
            members=members,
            seen=self._seen.before(server_round),
            generator=numpy_generator(self._settings.seed, purpose, round=server_round),
            rounds=self._settings.rounds,
            warn=partial(self._warn, server_round),
        )

    def _picked(
        self,
        server_round: int,
        members: Sequence[Member],
        ask: Callable[[], Sequence[Member]],
        then: str,
    ) -> list[Member]:
        try:
            clients = {member.client for member in ask()}
            why = "picked nobody"
        except Exception as error:  # whatever a plug-in raises
            clients, why = set(), f"failed: {_sentence(error)}"
        picked = among(members, clients)
        if not picked and members:
            self._warn(server_round, f"--select {self._spec} {why}: everyone {then}")
            return list(members)
        return picked

    def _warn(self, server_round: int, text: str) -> None:
        self._emit(Event("warning", server_round, name=text))


def _sentence(error: Exception) -> str:
    text = str(error) if isinstance(error, FedkitError) else f"{type(error).__name__}: {error}"
    return text.rstrip(".")
