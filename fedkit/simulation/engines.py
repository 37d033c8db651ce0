"""Who runs simulated clients, by name (``--engine``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkit.engine.local import Result


def engine(name: str) -> Callable[..., Result]:
    """The function that simulates a plan: ``fedkit.simulation.run.simulate``, or the same on Ray."""
    if name == "ray":
        from fedkit.simulation.ray import simulate as on_ray

        return on_ray
    from fedkit.simulation.run import simulate as in_processes

    return in_processes
