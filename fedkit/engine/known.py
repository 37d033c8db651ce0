"""What the driver itself must know of the rounds so far, to choose and to stop."""

from __future__ import annotations

from fedkit.engine.events import Event, Listener
from fedkit.engine.seen import Ledger
from fedkit.engine.stopping import Stopping
from fedkit.settings import FederationSettings


class Known:
    """The ledger of clients and the rules for stopping; it listens to events."""

    def __init__(self, settings: FederationSettings) -> None:
        self.seen = Ledger()
        self.stopping = Stopping(settings)

    def take(self, event: Event) -> None:
        """Take one event in."""
        self.seen.take(event)
        self.stopping.take(event)

    def taking_also(self, emit: Listener) -> Listener:
        """A listener that tells this first, then ``emit``."""

        def take(event: Event) -> None:
            self.take(event)
            emit(event)

        return take
