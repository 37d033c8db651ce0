"""What all commands know of the terminal, and of the process that started them."""

from __future__ import annotations

import os
import signal
import threading

# Set once from the command line: tell only results and what goes wrong.
quiet = False


def end_with_parent() -> None:
    """Under `fedkit run`: end when the parent is gone, however it went (its end of stdin closes)."""
    if not os.environ.get("FEDKIT_EXIT_WITH_PARENT"):
        return

    def watch() -> None:
        # The bare descriptor: Python's own stdin holds a lock that must be free when it exits.
        while os.read(0, 1024):
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
