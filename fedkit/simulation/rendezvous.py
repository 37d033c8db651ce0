"""Several clients' work side by side: where they train, they meet, and their models train as one.

A client's app is left as it is. Each runs in a thread of its own, but only one of them at a time: it is
left where it asks for steps, and goes on once they were taken.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from fedkit.models.batched import Failed, Verdict, examine, hooked, structure, train_batched
from fedkit.models.device import random_states, set_random_states
from fedkit.models.training import TAKEN_BY, Steps, one_by_one

T = TypeVar("T")


class Rendezvous(Generic[T]):
    """Several clients' work, with their training taken together.

    Attributes:
        apart: why clients' networks could not be batched, by the number of their work.
    """

    def __init__(self, works: Sequence[Callable[[], T]], resumed: Callable[[int], None]) -> None:
        """Work that has not begun.

        Args:
            works: of one client each, which share nothing.
            resumed: called with the number of a client's work before that goes on.
        """
        self.apart: dict[int, str] = {}
        self._clients = [_Client(work, number) for number, work in enumerate(works)]
        self._resumed = resumed
        self._failed: _Client[T] | None = None

    def results(self) -> Iterator[tuple[int, T]]:
        """Do it; yields the number of each work and what it returned, in the order in which they end.

        Raises:
            Exception: what a work raises.
        """
        going = self._clients
        while going:
            # What ends a run is not kept waiting.
            for client in sorted(going, key=lambda client: client is not self._failed):
                self._resumed(client.number)
                client.go_on()
                if client.ended:
                    yield client.number, client.result()
            going = [client for client in going if not client.ended]
            self._train(going)

    def _train(self, clients: Sequence[_Client[T]]) -> None:
        alike: defaultdict[Hashable, list[_Client[T]]] = defaultdict(list)
        for client in clients:
            client.asks.model.train()
            if hooked(client.asks.model):
                self.apart[client.number] = "each client has hooked something of its own onto it"
            else:
                alike[structure(client.asks)].append(client)
        for kind, group in alike.items():
            if len(group) == 1:
                continue
            verdict = _verdict(kind, group[0].asks)
            if verdict.why_not:
                self.apart |= {client.number: verdict.why_not for client in group}
            else:
                self._train_alike(group, verdict)

    def _train_alike(self, group: Sequence[_Client[T]], verdict: Verdict) -> None:
        try:
            losses = train_batched([client.asks for client in group], mixes=verdict.mixes)
        except Failed as failed:
            self._failed = group[failed.number]
            for client in group:
                client.error = failed.__cause__
            return
        for client, loss in zip(group, losses, strict=True):
            client.loss = loss


# What was found out about a kind of network holds for the next client that has it.
_verdicts: dict[Hashable, Verdict] = {}


def _verdict(kind: Hashable, steps: Steps) -> Verdict:
    if kind not in _verdicts:
        _verdicts[kind] = examine(steps)
    return _verdicts[kind]


class _Client(Generic[T]):
    """A thread that rests, but for the time in which ``go_on`` waits for it."""

    def __init__(self, work: Callable[[], T], number: int) -> None:
        self.number = number
        self.asks: Steps
        # Of the steps asked for, if somebody else took them.
        self.loss: float | None = None
        self.error: BaseException | None = None
        self._work = work
        self._answers: list[T] = []
        self._failed: BaseException | None = None
        self._may, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return bool(self._answers) or self._failed is not None

    def result(self) -> T:
        if self._failed is not None:
            raise self._failed
        return self._answers[0]

    def go_on(self) -> None:
        """Let it work until it asks for steps or ends."""
        self._may.release()
        self._rests.acquire()

    def _live(self) -> None:
        self._may.acquire()
        TAKEN_BY.set(self._ask)
        try:
            self._answers.append(self._work())
        except BaseException as error:  # is raised where the result is wanted
            self._failed = error
        self._rests.release()

    def _ask(self, steps: Steps) -> float:
        self.asks, self.loss = steps, None
        # torch's own generators are the process's: whoever works meanwhile draws from them, too.
        device = steps.samples.data.device
        random = random_states(device)
        self._rests.release()
        self._may.acquire()
        set_random_states(device, random)
        if self.error is not None:
            raise self.error
        return one_by_one(steps) if self.loss is None else self.loss
