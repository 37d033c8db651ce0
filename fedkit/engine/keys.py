"""Names for instructions: a round that is repeated gives the same, and what was done is not done again."""

from __future__ import annotations

import itertools
import secrets
from collections import Counter

from flwr.app import Message


class Keys:
    """Keys of a federation's instructions.

    A key names an instruction for good: federation, round, kind, client where its node id lasts, and which
    of that kind it is in the round. A round that is repeated, by this process or by one that goes on from a
    checkpoint, gives the same keys.

    Attributes:
        process: a word of this process's own.
    """

    def __init__(self, federation: str, *, nodes_last: bool) -> None:
        """No round has begun.

        Args:
            federation: its id.
            nodes_last: whether a client that was started anew keeps its node id; else keys are without it.
        """
        self._federation = federation
        self._nodes_last = nodes_last
        # What belongs to no round (joining) is asked anew by each process.
        self.process = secrets.token_hex(4)
        self._questions = itertools.count(1)
        self._in_round: Counter[str] = Counter()

    def begin_round(self) -> None:
        """A round begins, or begins again."""
        self._in_round.clear()

    def key(self, message: Message) -> str:
        """The next one, for a message that is to be sent."""
        meta = message.metadata
        kind = f"{self._federation}/{meta.group_id}/{meta.message_type}"
        of_node = f"{kind}/{meta.dst_node_id}"
        name = of_node if self._nodes_last else kind
        if meta.group_id in ("", "0"):
            return f"{name}/{self.process}-{next(self._questions)}"
        self._in_round[of_node] += 1
        return f"{name}/{self._in_round[of_node]}"
