"""How deep a network a device trains: as it was told, or as deep as its memory and its time allow.

A device may be told a width beside: it then trains the first channels of the first stages.
"""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, Context

from clients.edge import Edge
from clients.fitting import largest_that_fits
from fedkit.errors import UsageError
from fedkit.models.exit_loss import joint_loss
from fedkit.models.exits import deepest
from fedkit.models.levels import label
from fedkit.models.narrow import at_width

_log = logging.getLogger(__name__)
DEPTH, WIDTH, AUTO = "depth", "width", "auto"


def fitted(edge: Edge, context: Context) -> str:
    """The network with several exits that this device trains, in a federation on ``edge.model_name``.

    What was taken once is kept: what a device has learned is of that depth and width.

    Raises:
        UsageError: there is no such depth, the network can't be so narrow, or they were others before.
        FedkitError: with ``auto``, not even one stage fits.
    """
    edge.width = _width(context)
    wanted, kept = str(context.node_config.get(DEPTH, "")), context.state.config_records.get(DEPTH)
    most = deepest(edge.model_name, edge.data.shape, edge.outputs)
    if kept is not None and wanted in ("", AUTO):
        depth, edge.fit = int(str(kept[DEPTH])), str(kept["fit"])
    elif wanted == AUTO:
        depth = _deepest_that_fits(edge, context, most)
    else:
        depth = int(wanted or most)
    if depth > most:
        raise UsageError(f"--depth {depth}: {edge.model_name} has {most} stages on these data.")
    share = edge.width or 1.0
    if kept is not None:
        before = int(str(kept[DEPTH])), float(str(kept[WIDTH]))
        if (depth, share) != before:
            raise UsageError(
                f"This device has trained {before[0]} stages at width {before[1]:g} in this federation: "
                f"give --depth {before[0]} --width {before[1]:g}, or --reset-state to begin anew."
            )
    context.state[DEPTH] = ConfigRecord({DEPTH: depth, WIDTH: share, "fit": edge.fit})
    edge.depth = depth
    return _network(edge, depth)


def _width(context: Context) -> float | None:
    wanted = str(context.node_config.get(WIDTH, ""))
    if wanted == AUTO:
        raise UsageError(
            "In depthfl a device finds its depth and not its width: give --depth auto, and --width a "
            "number or leave it out."
        )
    # No finer than it is written in the network's name.
    return float(label(float(wanted))) if wanted else None


def _deepest_that_fits(edge: Edge, context: Context, most: int) -> int:
    """How deep the deepest network within ``--memory-budget`` and ``--time-budget`` is."""
    specs = {_network(edge, depth): depth for depth in range(most, 0, -1)}
    found = largest_that_fits(edge, context, specs, joint_loss())
    depth, edge.fit = specs[found.spec], str(found)
    _log.warning(
        "This device trains %d of %d stages of %s: %s.", depth, most, edge.model_name, edge.fit
    )
    return depth


def _network(edge: Edge, depth: int) -> str:
    return at_width(f"exits:{depth}:{edge.model_name}", edge.width or 1.0)
