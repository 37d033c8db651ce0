"""The roster: which clients are in the federation, as they told it at join.

A node that the grid offers is asked ``query.join`` once; what it answers is held against the server's
own view before it may take part. This works on every engine, since it is a Flower message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.events import Event, Listener
from fedkit.engine.registered import JoinsWhenChosen, Registered
from fedkit.errors import plain


@dataclass(frozen=True)
class Member:
    """One client of the federation.

    Attributes:
        node_id: Flower's node id.
        client: its index, which is its shard: seeds, order of summation and matrix rows hang on it.
        name: how people call it.
        model: its architecture.
        examples: how many samples it trains on.
        parameters: scalars in its model.
        device: where it computes.
        codecs: the names of the codecs that it knows.
        tags: words by which its owner wants it to be found.
        corrupt: what its inputs suffer from, on purpose; empty: nothing.
        width: the share of every layer's channels that it is able to train; None: it does not say.
        fit: what that takes there, where it was measured, in words.
        depth: how many stages of a network with several exits it trains; None: it does not say.
    """

    node_id: int
    client: int
    name: str
    model: str
    examples: int
    parameters: int
    device: str
    codecs: tuple[str, ...]
    tags: tuple[str, ...] = ()
    corrupt: str = ""
    width: float | None = None
    fit: str = ""
    depth: int | None = None


@runtime_checkable
class CanDismiss(Protocol):
    """A grid that can send a client away with a sentence."""

    def dismiss(self, node_id: int, sentence: str) -> None:
        """End that client's session and tell it why."""
        ...


@runtime_checkable
class KnowsProcesses(Protocol):
    """A grid that can tell a restarted client from one that only reconnected."""

    def processes(self) -> dict[int, str]:
        """A word for each node's present process."""
        ...


Check = Callable[[int, ConfigRecord], str | None]
# (whether the client lacks the public set) -> what it is told when it is asked to join.
Offer = Callable[[bool], RecordDict]


class NothingToSend(Exception):
    """The server does not send its public set; the sentence says why."""


@dataclass(frozen=True)
class _Question:
    node_id: int
    process: str
    asked_at: float
    with_public: bool


class Roster:
    """Members by node id, kept as clients come."""

    def __init__(
        self,
        grid: Grid,
        check: Check,
        emit: Listener,
        patience: float = 3600.0,
        offer: Offer = lambda lacks_public: RecordDict(),
    ) -> None:
        """A roster over ``grid``.

        Args:
            grid: where the clients are.
            check: ``(node_id, facts)`` gives the sentence that refuses a join, or None.
            emit: takes events.
            patience: seconds that a client has to load its data and say what it is.
            offer: what a client is told when it is asked; with the public set if it lacks that.
        """
        self._offer = offer
        self._grid = grid
        self._check = check
        self._emit = emit
        self._patience = patience
        self._asked: dict[str, _Question] = {}
        self._turned_away: set[int] = set()
        self._present: set[int] = set()
        self._processes: dict[int, str] = {}
        self._registered = grid.registered if isinstance(grid, JoinsWhenChosen) else None
        self.members: dict[int, Member] = {}

    def ask_again(self) -> None:
        """Forget who was turned away: a client that came back meanwhile may have been mended."""
        self._turned_away.clear()

    def admit(self) -> None:
        """Ask new nodes to join, and take in those that have answered since the last call.

        Who is registered only is asked when it is chosen.
        """
        if self._registered is not None:
            return
        present = set(self._grid.get_node_ids())
        now = self._grid.processes() if isinstance(self._grid, KnowsProcesses) else {}
        self._give_up_silent()
        waiting = {question.node_id for question in self._asked.values()}
        # One that went away and comes back, perhaps mended, is asked again.
        self._turned_away &= present
        if self._present - present and not isinstance(self._grid, CanDismiss):
            # Whoever is gone may have held what another wants that still waits: nothing sent it away.
            self._turned_away.clear()
        self._present = present
        # A member that is another process now may have other data, so it is asked again. It stays in
        # meanwhile: what it answers to the round's instructions is awaited.
        restarted = {n for n, process in now.items() if self._processes.get(n) != process}
        known = set(self.members) - restarted
        self._ask(sorted(present - known - waiting - self._turned_away), now)
        self._take_answers()

    def with_all(self, chosen: Sequence[Member]) -> list[Member]:
        """Those who were chosen, once all of them have joined; who may not join is left out."""
        self._ask([m.node_id for m in chosen if m.node_id not in self.members], {})
        self._take_answers()
        return [self.members[m.node_id] for m in chosen if m.node_id in self.members]

    def _take_answers(self) -> None:
        if self._asked:
            holders = {member.client: node_id for node_id, member in self.members.items()}
            for reply in self._grid.pull_messages(list(self._asked)):
                asked = self._asked.pop(reply.metadata.reply_to_message_id)
                lacking = _lacking(reply)
                if lacking is not None and not asked.with_public:
                    self._ask([asked.node_id], {asked.node_id: asked.process}, with_public=True)
                elif lacking is not None:
                    sentence = f"It was sent the public set and still lacks it: {lacking}"
                    self._refuse(asked.node_id, sentence)
                elif self._take(asked.node_id, reply, holders):
                    self._processes[asked.node_id] = asked.process

    def _ask(
        self, node_ids: Sequence[int], processes: Mapping[int, str], *, with_public: bool = False
    ) -> None:
        if not node_ids:
            return
        try:
            offer = self._offer(with_public)
        except NothingToSend as reason:
            for node_id in node_ids:
                self._refuse(node_id, str(reason))
            return
        # All at once: an engine may have several at work on their answers.
        questions = [Message(offer, node_id, "query.join", group_id="0") for node_id in node_ids]
        for node_id, message_id in zip(node_ids, self._grid.push_messages(questions), strict=True):
            process = processes.get(node_id, "")
            self._asked[message_id] = _Question(node_id, process, time.monotonic(), with_public)

    def connected(self) -> Sequence[Member]:
        """The members whose node the grid offers now, in client order; registered ones are all there."""
        if self._registered is not None:
            return Registered(self._registered, self.members)
        present = set(self._grid.get_node_ids())
        here = [member for node_id, member in self.members.items() if node_id in present]
        return sorted(here, key=lambda member: member.client)

    def _take(self, node_id: int, reply: Message, holders: dict[int, int]) -> bool:
        """Whether that client is a member now; ``holders`` are the members' nodes by client."""
        if not reply.has_content():
            self._turned_away.add(node_id)
            text = f"a client could not join: {reply.error.reason}"
            self._emit(Event("warning", name=text))
            return False
        try:
            member = read_member(node_id, reply.content)
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(node_id, f"What it says of itself can't be read: {error}.")
            return False
        sentence = self._check(node_id, reply.content.config_records["join"])
        holder = holders.get(member.client, node_id)
        if sentence is None and holder != node_id and holder in set(self._grid.get_node_ids()):
            sentence = f"Client {member.client} is in this federation already."
        if self.members.get(node_id) == member and sentence is None:
            return True
        before = self.members.pop(node_id, None)
        if before is not None:
            del holders[before.client]
        if sentence is not None:
            self._refuse(node_id, sentence)
            return False
        # A device that lost its state comes back as another node with the same index.
        self.members.pop(holder, None)
        self.members[node_id], holders[member.client] = member, node_id
        text = f"{member.model} ({member.parameters:,} parameters) on {member.device}"
        if member.fit:
            text += f", which takes {member.fit}"
        if member.corrupt:
            text += f", its inputs corrupted by {member.corrupt}"
        self._emit(Event("join", client=member.client, name=text, value=member.examples))
        return True

    def _give_up_silent(self) -> None:
        """Who does not say what it is keeps a shard from others."""
        for message_id, question in list(self._asked.items()):
            if time.monotonic() - question.asked_at > self._patience:
                del self._asked[message_id]
                sentence = (
                    f"It did not say in {self._patience:g} seconds what data and model it has."
                )
                self._refuse(question.node_id, sentence)

    def _refuse(self, node_id: int, sentence: str) -> None:
        self._turned_away.add(node_id)
        self._emit(Event("warning", name=f"a client was refused: {sentence}"))
        if isinstance(self._grid, CanDismiss):
            self._grid.dismiss(node_id, sentence)


def _lacking(reply: Message) -> str | None:
    """Why a client has no public set, if that is what it says."""
    facts = reply.content.config_records.get("join") if reply.has_content() else None
    return plain(str(facts["lacks-public"])) if facts and "lacks-public" in facts else None


def read_member(node_id: int, content: RecordDict) -> Member:
    """The member that a client says it is.

    Raises:
        KeyError, TypeError, ValueError: it does not say so in the way that fedkit's clients do.
    """
    facts, sizes = content.config_records["join"], content.metric_records["metrics"]
    numbers = facts["client"], sizes["num-examples"], sizes["parameters"]
    client, examples, parameters = (
        number if isinstance(number, int) and number >= 0 else None for number in numbers
    )
    if client is None or examples is None or parameters is None:
        raise ValueError(f"client, samples and parameters are {numbers}")
    model, device = _word(facts["model"]), _word(facts["device"])
    return Member(
        node_id=node_id,
        client=client,
        name=f"client {client} ({model})",
        model=model,
        examples=examples,
        parameters=parameters,
        device=device,
        codecs=_words(facts["codecs"]),
        tags=_words(facts.get("tags", [])),
        corrupt=_word(facts.get("corrupt", "")),
        width=_share(facts.get("width")),
        fit=_word(facts.get("fit", "")),
        depth=_depth(facts.get("depth")),
    )


def _share(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, float) or not 0 < value <= 1:
        raise ValueError(f"its width is {value!r}")
    return value


def _depth(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"its depth is {value!r}")
    return value


def _words(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > 100:
        raise ValueError("what it knows is no list of names")
    return tuple(_word(value) for value in values)


def _word(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 100:
        raise ValueError("a name is no plain word")
    return value
