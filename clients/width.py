"""How wide a network a device trains, as it was told or as its memory and its time allow; and how."""

from __future__ import annotations

import copy
import logging

from flwr.app import ConfigRecord, Context

from clients import memory
from clients.edge import Edge, refuse_parts
from clients.fitting import largest_that_fits
from clients.private import local_epochs, private_batch
from fedkit.errors import UsageError
from fedkit.models.levels import read_levels
from fedkit.models.losses import Loss, cross_entropy
from fedkit.models.narrow import at_width, width_of
from fedkit.models.normalisation import batch_moments, tracks
from fedkit.models.slicing import Slicing

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


def scaled_epochs(
    edge: Edge,
    context: Context,
    slot: str,
    config: ConfigRecord,
    slicing: Slicing,
    divisor: float,
    loss: Loss,
) -> float:
    """A round's private training in which hidden outputs are divided (HeteroFL's scaler); its mean loss.

    Running statistics that are tracked meanwhile are of divided outputs, and the network is used without
    the scaler: they become the moments of this client's batches without it.

    Args:
        edge, context, slot, config: whose model, in which round.
        slicing: of the network that the model in ``slot`` is a part of.
        divisor: its share of the widest network's channels; 1: nothing is divided.
        loss: ``(logits, labels) -> mean over a batch``.
    """
    model, data = edge.models[slot], edge.private.train
    with slicing.scaled(model, divisor):
        mean = local_epochs(edge, context, slot, config, loss=loss)
    if divisor < 1 and tracks(model):
        moments, batches = batch_moments(copy.deepcopy(model), data, private_batch(config))
        if batches:
            model.load_state_dict({**model.state_dict(), **moments})
            edge.keep(context, slot)
    return mean


def _widest_that_fits(edge: Edge, context: Context, levels: tuple[float, ...]) -> None:
    """Choose the widest level within ``--memory-budget`` and ``--time-budget``."""
    specs = (at_width(edge.model_name, level) for level in levels)
    found = largest_that_fits(edge, context, specs, cross_entropy)
    edge.width, edge.fit = width_of(found.spec), str(found)
    _log.warning("This device trains %s at width %g: %s.", edge.model_name, edge.width, edge.fit)
