"""What each message of a run tells of the federation, beside what the strategy says in it.

A SuperNode starts a process for each message, and another run's processes know nothing of this one's: so
every message says whose it is, which one it is, and what the federation has agreed on (some 2 kB).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedkit import __version__
from fedkit.engine.membership import safe_name
from fedkit.errors import FedkitError
from fedkit.settings import FederationSettings, Value, as_config, build

RECORD = "federation"
# The shard of a node that is given none.
NO_SHARD = -1


@dataclass(frozen=True)
class Told:
    """What the server says in a message.

    Attributes:
        federation: its id, which stays the same where a run is resumed.
        key: names the instruction for good, for each client; a repeated one has the same.
        shard: which one the node gets if it does not say itself; ``NO_SHARD``: all are taken.
        settings: the federation's, by outside name.
    """

    federation: str
    key: str
    shard: int
    settings: dict[str, Value]

    def record(self) -> ConfigRecord:
        """As it travels."""
        return ConfigRecord(
            {
                "version": __version__,
                "id": self.federation,
                "key": self.key,
                "shard": self.shard,
                "settings": json.dumps(self.settings),
            }
        )


def take_told(message: Message) -> Told:
    """What a message tells; the client's app gets the message without it.

    Raises:
        FedkitError: it comes from another version of fedkit, or from no fedkit at all.
        UsageError: a setting is out of range.
    """
    record = message.content.config_records.get(RECORD)
    if record is None:
        raise FedkitError("The message comes from no fedkit: this node runs fedkit's apps only.")
    del message.content[RECORD]
    theirs = str(record.get("version"))
    if theirs != __version__:
        # Another version may train, draw or sum otherwise, and nobody would notice.
        raise FedkitError(
            f"The server runs fedkit {theirs}, this node {__version__}: install the same "
            "version on both."
        )
    try:
        shard = record["shard"]
        if not isinstance(shard, int):
            raise TypeError(f"its shard is {shard!r}")
        settings = build(FederationSettings, dict(json.loads(str(record["settings"]))))
        told = Told(safe_name(record["id"]), str(record["key"]), shard, as_config(settings))
    except (KeyError, TypeError, ValueError) as error:
        raise FedkitError(
            f"What the server tells of the federation can't be read: {error}."
        ) from error
    return told
