"""What Flower's ``Grid`` asks of an engine beside carrying messages, the same for all of fedkit's."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class EngineGrid(Grid):
    """A grid of one run, whose messages are made by calling ``Message``."""

    @property
    def run(self) -> Run:
        """Flower's description of a run; fedkit's own lies in the run directory."""
        return Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """A grid serves one run; there is nothing to set."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message; the same as calling ``Message`` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
