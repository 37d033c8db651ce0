"""The ledger: what was asked of whom, and what came back.

The thread that drives the rounds and the event loop both use it; each method is one step under one
lock. An instruction stays pending until it is answered, withdrawn, or its client is lost.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedkit.link.frames import MAX_MESSAGE_BYTES, Parcel
from fedkit.link.node import Instruction, Lost, Node
from fedkit.link.spool import Reply, Spool

if TYPE_CHECKING:
    from fedkit.link.session import Session

TRANSFERS_IN_FLIGHT = 64
JOIN_BYTES = 1 << 20
# Clients that are gone are remembered; beyond so many, not those that went longest ago.
NODES_REMEMBERED = 20_000


class Ledger:
    """Nodes, their instructions, and the results that wait to be taken."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        """``nodes``: those of a federation that goes on."""
        self._lock = threading.Condition()
        self._nodes = {node.node_id: node for node in nodes}
        self._by_identity = {node.identity: node for node in self._nodes.values()}
        self._latest = 1
        self._results: dict[str, Reply | Lost] = {}
        self._slots = TRANSFERS_IN_FLIGHT
        self._announced = False
        self.spool = Spool()
        # What the link really carried, by the account that ``send`` named; how instructions ended.
        self.bytes_received: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def nodes(self) -> list[Node]:
        """All nodes that ever joined, in order of their first join."""
        with self._lock:
            return list(self._nodes.values())

    def present(self) -> list[int]:
        """The nodes that are connected now or may still come back."""
        with self._lock:
            return [node.node_id for node in self._nodes.values() if node.here]

    def node(self, node_id: int) -> Node | None:
        """The node of that id."""
        with self._lock:
            return self._nodes.get(node_id)

    def find(self, identity: str) -> Node | None:
        """The node of that identity."""
        with self._lock:
            return self._by_identity.get(identity)

    def next_id(self) -> int:
        """The id of the next node; 1 is the server's own."""
        with self._lock:
            self._latest = max(self._latest, *self._nodes, 1) + 1
            return self._latest

    def ask(
        self, node_id: int, key: str, parcel: Parcel, account: str, deadline: float | None
    ) -> Node | None:
        """Queue an instruction once there is room for another transfer; the node to be woken."""
        with self._lock:
            node = self._nodes.get(node_id)
            # One that may come back takes no slot meanwhile from those that are here.
            waits = node is not None and node.session is not None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            room = not waits or self._lock.wait_for(lambda: self._slots > 0, left)
            if node is None or not node.here:
                self._settle(key, Lost("it is not connected"), "lost")
                return None
            if not room:
                self._settle(key, Lost("the time was up before it could be sent"), "lost")
                return None
            self._slots -= waits
            node.settled.pop(key, None)
            node.pending[key] = Instruction(parcel, account, has_slot=waits)
            node.unsent.append(key)
            return node

    def enter(self, node: Node, session: Session) -> None:
        """A connection of this node begins: it gets everything pending (again)."""
        with self._lock:
            self._nodes[node.node_id] = self._by_identity[node.identity] = node
            node.session, node.left, node.lost_at = session, False, None
            # Sent away before: it may have been mended since, and is judged anew.
            node.refusal = None
            node.unsent.clear()
            node.unsent.extend(node.pending)
            self._forget_strangers()

    def leave(self, node: Node, session: Session) -> bool:
        """That connection ended; tells whether the node is gone for good."""
        with self._lock:
            if node.session is not session:
                return False  # another connection has taken over
            node.session = None
            node.left_at = time.monotonic()
            over = node.left or node.goodbye is not None or node.refusal is not None
            if over:
                self._drop(node, "it left" if node.left else "it was sent away")
            else:
                node.lost_at = node.left_at
                for instruction in node.pending.values():
                    self._free(instruction)
            return over

    def leaving(self, node: Node, session: Session) -> None:
        """The client says on that connection that it goes on purpose."""
        with self._lock:
            node.left = node.session is session

    def give_up(self, node: Node, lost_at: float, reason: str) -> bool:
        """The node has not come back; false if it has."""
        with self._lock:
            if node.lost_at != lost_at:
                return False
            node.lost_at = None
            self._drop(node, reason)
            return True

    def next_unsent(self, node: Node, session: Session) -> tuple[str, Instruction] | None:
        """What that connection sends next."""
        with self._lock:
            # Another connection may have taken over between two messages.
            if not node.unsent or node.session is not session:
                return None
            key = node.unsent.popleft()
            instruction = node.pending[key]
            instruction.sent = True
            return key, instruction

    def free_slot(self, instruction: Instruction) -> None:
        """A transfer is over; one that is repeated after a reconnect had its slot only once."""
        with self._lock:
            self._free(instruction)

    def limit_of(self, node: Node, key: str) -> int | None:
        """How large this node's reply to ``key`` may be; None if it would not count."""
        with self._lock:
            if key not in node.pending:
                return None
            # Who is asked to join is still a stranger, and has but a few words to say.
            joining = node.pending[key].account.startswith("query.")
            return JOIN_BYTES if joining else MAX_MESSAGE_BYTES

    def answer(self, node: Node, key: str, reply: Reply | None, carried: int) -> str:
        """A whole reply came: ``answered``, or why it does not count (late, duplicate, unasked).

        Args:
            node: whose.
            key: to what.
            reply: None where nobody waited for it when it began to come.
            carried: bytes that its frames had.
        """
        with self._lock:
            # Who is not asked may be late, repeat itself, or answer for somebody else.
            if reply is None or key not in node.pending:
                outcome = node.settled.get(key, "unasked")
                outcome = "duplicate" if outcome == "answered" else outcome
                self.outcomes[outcome] += 1
                if reply is not None:
                    reply.discard()
                return outcome
            self.bytes_received[node.pending[key].account] += carried
            self._forget(node, key, "answered")
            self._settle(key, reply, "answered")
            return "answered"

    def take(self, keys: set[str], deadline: float | None) -> dict[str, Reply | Lost]:
        """Results for some of ``keys``: at least one, unless the monotonic deadline has passed."""
        with self._lock:
            while True:
                found = {key: self._results.pop(key) for key in self._results.keys() & keys}
                left = None if deadline is None else deadline - time.monotonic()
                if found or (left is not None and left <= 0):
                    return found
                self._lock.wait(left)

    def withdraw(self, keys: set[str]) -> list[tuple[Session, str]]:
        """Expect no more replies to ``keys``; gives the sessions whose client works on one."""
        told = []
        with self._lock:
            for node in self._nodes.values():
                for key in keys & node.pending.keys():
                    if node.pending[key].sent and node.session is not None:
                        told.append((node.session, key))
                    self._forget(node, key, "late")
            for key in keys:
                result = self._results.pop(key, None)
                if isinstance(result, Reply):
                    result.discard()
        return told

    def _forget_strangers(self) -> None:
        # Whoever may join could come under ever new identities.
        many = len(self._nodes) - NODES_REMEMBERED
        if many <= 0:
            return
        gone = [node for node in self._nodes.values() if not node.here]
        for node in sorted(gone, key=lambda node: node.left_at)[:many]:
            del self._nodes[node.node_id], self._by_identity[node.identity]

    def _drop(self, node: Node, reason: str) -> None:
        for key in list(node.pending):
            self._forget(node, key, "late")
            self._settle(key, Lost(reason), "lost")

    def _forget(self, node: Node, key: str, outcome: str) -> None:
        self._free(node.pending.pop(key))
        if key in node.unsent:
            node.unsent.remove(key)
        node.remember(key, outcome)

    def _free(self, instruction: Instruction) -> None:
        if instruction.has_slot:
            instruction.has_slot = False
            self._slots += 1
            self._announce()

    def _settle(self, key: str, result: Reply | Lost, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._results[key] = result
        self._announce()

    def _announce(self) -> None:
        """Wake who waits; on the loop once for all that happens in one go, since waking costs most."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._lock.notify_all()
            return
        if not self._announced:
            self._announced = True
            loop.call_soon(self._tell)

    def _tell(self) -> None:
        with self._lock:
            self._announced = False
            self._lock.notify_all()
