"""What several test files share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# As `fedkit` sets it itself: gRPC writes lines of its own else, where a sentence is expected.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import pytest
from hypothesis import settings
from links import Served, stop_clients

# How long an example takes is the machine's business.
settings.register_profile("fedkit", deadline=None)
settings.load_profile("fedkit")


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """A command that was called in this process has set up logging for itself."""
    loggers = [logging.getLogger(name) for name in ("fedkit", "flwr")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A listening server; ``links.serving`` gives it options."""
    one = Served(**getattr(request, "param", {}))
    yield one
    one.close()
    stop_clients()
