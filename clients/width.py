"""How wide a network a device trains: as it was told, or as wide as its memory and its time allow."""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, Context

from clients import memory
from clients.edge import Edge, refuse_parts
from clients.fitting import largest_that_fits
from fedkit.errors import UsageError
from fedkit.models.levels import read_levels
from fedkit.models.losses import cross_entropy
from fedkit.models.narrow import at_width, width_of

_log = logging.getLogger(__name__)
WIDTH, AUTO = "width", "auto"


def fitted(edge: Edge, context: Context) -> str:
    """The part of ``edge.model_name`` that this device trains; all of it where it was told no width.

    That is the widest of the run's levels that it was told, or that ``auto`` finds. What was taken once is
    kept: what a device has learned is of that width.

    Raises:
        UsageError: the network can't be so narrow, the run has no such level, it was another before, or
            a depth was asked for beside.
        FedkitError: with ``auto``, not even the narrowest level fits.
    """
    refuse_parts(edge, context, known=WIDTH)
    wanted = str(context.node_config.get(WIDTH, ""))
    if not wanted:
        return edge.model_name
    levels = read_levels(memory.recall_levels(context))
    kept = context.state.config_records.get(WIDTH)
    if wanted == AUTO and kept is not None:
        edge.width, edge.fit = float(str(kept[WIDTH])), str(kept["fit"])
    elif wanted == AUTO:
        _widest_that_fits(edge, context, levels)
    else:
        edge.width = next((level for level in levels if level <= float(wanted)), None)
        if edge.width is None:
            raise UsageError(
                f"Its width {wanted} is less than the least of this run's levels ({levels[-1]:g}): give "
                f"--width {levels[-1]:g}, or the server a narrower level (-o levels=...)."
            )
        before = edge.width if kept is None else float(str(kept[WIDTH]))
        if edge.width != before:
            raise UsageError(
                f"This device has trained at width {before:g} in this federation: give --width "
                f"{before:g}, or --reset-state to begin anew."
            )
    assert edge.width is not None
    context.state[WIDTH] = ConfigRecord({WIDTH: edge.width, "fit": edge.fit})
    return at_width(edge.model_name, edge.width)


def _widest_that_fits(edge: Edge, context: Context, levels: tuple[float, ...]) -> None:
    """Choose the widest level within ``--memory-budget`` and ``--time-budget``."""
    specs = (at_width(edge.model_name, level) for level in levels)
    found = largest_that_fits(edge, context, specs, cross_entropy)
    edge.width, edge.fit = width_of(found.spec), str(found)
    _log.warning("This device trains %s at width %g: %s.", edge.model_name, edge.width, edge.fit)
