"""What a selector is: it sees what the server knows of each client, and says who takes part.

A selector without a probe says before the round who takes part. One with a probe says who is probed
(trains for the first epoch and tells how that went), then who goes on; the others stop early and send
nothing. It is the driver that plans these exchanges, for any strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from fedkit.engine.roster import Member


@dataclass(frozen=True)
class Seen:
    """What the server has seen of one client so far; the newest comes last.

    Attributes:
        rounds: the rounds in which its work counted.
        losses: its training losses in these (NaN where it told none).
        seconds: what its work took in these, by its own clock, a probe included.
        transfer_seconds: what its instructions and replies took on the way in these, as far as the
            server can tell; a probe's is left out.
        bytes_up: tensor bytes that it sent in these.
        probed: rounds in which it was probed, ``rejected``: in which it was then stopped early.
        probe_seconds, probe_losses: of each probe.
        missed: rounds in which it was chosen and did not answer.
    """

    rounds: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    transfer_seconds: tuple[float, ...] = ()
    bytes_up: tuple[int, ...] = ()
    probed: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    probe_seconds: tuple[float, ...] = ()
    probe_losses: tuple[float, ...] = ()
    missed: tuple[int, ...] = ()


@dataclass(frozen=True)
class View:
    """What a selector decides by.

    Attributes:
        round: the round that begins, counted from 1.
        members: who is connected, in client order.
        seen: what is known of each client, by its index.
        generator: the round's, for what is drawn.
        rounds: how many the run has; 0: not known.
        warn: takes a sentence for people; the round goes on.
    """

    round: int
    members: Sequence[Member]
    seen: Mapping[int, Seen]
    generator: np.random.Generator
    rounds: int = 0
    warn: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Probe:
    """What a client told after the probing epoch.

    Attributes:
        loss: mean training loss of that epoch.
        seconds: that it took, by the client's clock (or the emulated one).
        upload_bytes: tensor bytes that it would send if it goes on.
    """

    loss: float
    seconds: float
    upload_bytes: int


@dataclass(frozen=True)
class Outcome:
    """How a round went, for selectors that learn.

    Attributes:
        round: which.
        accuracy: mean accuracy on validation data (in [0, 1]) after the round; NaN if none was measured.
        seconds: the round's processing latency: the slowest probe, then the slowest that went on.
        bytes_up: tensor bytes that came up.
        kept: clients whose work counted; ``lost``: those that were to go on and did not answer.
    """

    round: int
    accuracy: float
    seconds: float
    bytes_up: int
    kept: tuple[int, ...]
    lost: tuple[int, ...] = ()


@runtime_checkable
class Selector(Protocol):
    """Says who takes part; made from the argument after its name.

    One with an attribute ``needs_facts`` that is false goes by who there is, and not by what they told when
    they joined: of ``view.members`` only number and network count, and clients join when they are chosen.

    One that learns keeps what it remembers in an attribute ``state``, a dataclass that
    ``fedkit.engine.strategy_state`` can save: it is in the checkpoint, and set again on resume.
    """

    # Whether it wants clients probed before it decides.
    probes: bool

    def choose(self, view: View) -> Sequence[Member]:
        """Who takes part in the round (or is probed)."""
        ...

    def keep(self, view: View, probes: Mapping[int, Probe]) -> Sequence[Member]:
        """Who goes on, of those that were probed (by client index); the others stop early."""
        ...

    def learn(self, outcome: Outcome) -> None:
        """Take note of how the round went."""
        ...
