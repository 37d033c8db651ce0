"""The networks of a server that was killed, or still works: as its last checkpoint has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord

from fedkit.engine.checkpoint import Checkpoints
from fedkit.engine.facts import ServerView
from fedkit.engine.plan import Plan
from fedkit.engine.saved import Found
from fedkit.engine.strategy import FederatedStrategy, build_hyperparameters
from fedkit.models.files import About, SavedModel, about_of
from fedkit.registry import load
from fedkit.security.settings import ServerSecurity
from fedkit.settings import DataSettings, FederationSettings, ServerSettings, build, read_toml


def models_at_checkpoint(run: Path, sources: DataSettings) -> list[Found]:
    """The server's models by label; none where the strategy has none, or nothing was kept yet.

    Args:
        run: the run directory.
        sources: where this machine keeps data sets; a checkpoint does not say what networks read.

    Raises:
        FedkitError: the run's settings or its data can't be read here.
    """
    values = read_toml(str(run / "config.toml"))
    settings = build(FederationSettings, values)
    kind: type[FederatedStrategy] = load("strategies", settings.strategy)
    if kind.server_models is FederatedStrategy.server_models:
        return []
    checkpoint = next(iter(Checkpoints(run).newest()), None)
    if checkpoint is None:
        return []
    hyper = build_hyperparameters(kind, values)
    view = ServerView(Plan(settings, hyper, ServerSettings(), ServerSecurity(), sources, None))
    strategy = kind(hyper, view.facts(), lambda event: None)
    try:
        if strategy.state is not None:
            strategy.state = checkpoint.strategy_state(type(strategy.state))
        models = strategy.server_models(checkpoint.arrays)
    finally:
        strategy.close()
    round = checkpoint.progress.round
    return [
        Found(
            label,
            partial(_saved, arrays, about_of(view.data, spec, round=round), checkpoint.folder),
        )
        for label, (spec, arrays) in sorted(models.items())
    ]


def _saved(arrays: ArrayRecord, about: About, source: Path) -> SavedModel:
    return SavedModel({name: array.numpy() for name, array in arrays.items()}, about, source)
