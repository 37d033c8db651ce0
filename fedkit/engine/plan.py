"""A plan: everything that was typed, checked, and with its defaults filled in, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fedkit.data.corruption import read_noise
from fedkit.data.names import (
    OF_FILES,
    OWN,
    check_names,
    partition_specs,
    public_parts,
    resolve_public,
)
from fedkit.devices.profiles import profiles
from fedkit.engine.stopping import check_rules
from fedkit.errors import UsageError
from fedkit.models.budget import read_depth, read_seconds, read_width
from fedkit.registry import OWN_CODE, allow, code_of, listed, load, names, split
from fedkit.security.settings import ServerSecurity, check_server, is_loopback
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    RunSettings,
    ServerSettings,
    Value,
    as_config,
    build,
    key,
    merge,
    refuse_unknown,
)

if TYPE_CHECKING:
    from fedkit.engine.strategy import FederatedStrategy


@dataclass(frozen=True)
class Plan:
    """A federation about to be run.

    Attributes:
        federation: what every client takes over.
        hyper: the strategy's hyper-parameters.
        server: where the server listens and writes.
        security: how the server is secured; a local run stays on loopback, in plaintext.
        data: where this machine keeps data sets.
        local: the local clients, if `fedkit run` starts them.
    """

    federation: FederationSettings
    hyper: Any
    server: ServerSettings
    security: ServerSecurity
    data: DataSettings
    local: RunSettings | None

    @property
    def strategy(self) -> type[FederatedStrategy]:
        """The strategy's class."""
        kind: type[FederatedStrategy] = load("strategies", self.federation.strategy)
        return kind

    def values(self) -> dict[str, Value]:
        """All settings by outside name, as ``config.toml`` holds them."""
        parts = (self.federation, self.hyper, self.server, self.security, self.data, self.local)
        return merge(*(as_config(part) for part in parts if part is not None))


# What `fedkit run` changes of the federation's defaults: a run on one machine is for comparing.
LOCAL_DEFAULTS: Mapping[str, Value] = {"alone": True, "rounds": 10}


def make_plan(values: Mapping[str, Value], *, local: bool = False) -> Plan:
    """A plan from settings by outside name.

    Args:
        values: what was typed or read from a file; later layers already on top.
        local: whether `fedkit run` starts the clients too.

    Raises:
        UsageError: an unknown name, a value out of range, or settings that contradict each other.
    """
    from fedkit.engine.strategy import build_hyperparameters

    values = merge(values)
    strategy_name = str(values.get("strategy", build(FederationSettings, {}).strategy))
    strategy: type[FederatedStrategy] = load("strategies", strategy_name)
    kinds: list[type] = [
        FederationSettings,
        strategy.Hyperparameters,
        ServerSettings,
        ServerSecurity,
        DataSettings,
    ]
    if local:
        kinds.append(RunSettings)
    refuse_unknown(values, kinds, strategy.ELSEWHERE)
    hyper = build_hyperparameters(strategy, values)
    implied = _implied(strategy, hyper.preset)
    run = build(RunSettings, values) if local else None
    if run is not None:
        clients = run.clients
        implied = {**LOCAL_DEFAULTS, "num-shards": clients, "min-clients": clients, **implied}
    federation = build(FederationSettings, {**implied, **values})
    sources = build(DataSettings, values)
    models = _model_names(run.models) if run is not None else []
    allow(federation.dataset, federation.model, *partition_specs(federation), *models)
    if federation.public != "auto":
        allow(public_parts(federation)[0])
    check_names(federation)
    check_rules(federation)
    federation = resolve_public(federation)
    if run is None and federation.min_clients > federation.num_shards:
        raise UsageError(
            f"min-clients is {federation.min_clients}, but there are only {federation.num_shards} "
            "shards (num-shards), one for each client."
        )
    if run is not None:
        _check_local(federation, run)
    server = build(ServerSettings, values)
    _check_address(server.listen)
    security = _security(values, server, local)
    plan = Plan(federation, hyper, server, security, sources, run)
    strategy.check(federation, hyper)
    if run is not None and run.widths and not strategy.by_width:
        raise UsageError(
            f"widths go with heterofl and depthfl, not with {federation.strategy}: leave --widths out."
        )
    if run is not None and run.depths and not strategy.by_depth:
        raise UsageError(
            f"depths go with the strategy depthfl, not with {federation.strategy}: leave --depths out."
        )
    if run is not None and run.time_budgets and not _budgets_time(hyper, run):
        raise UsageError(
            "Nothing in this run asks for --time-budgets: set work=budget with the strategy fedprox, or "
            "--widths or --depths with auto, or leave it out."
        )
    return plan


def check_shards(plan: Plan) -> None:
    """Raise ``UsageError`` where there is no shard for every local client; a simulation needs none."""
    assert plan.local is not None
    clients, shards = plan.local.clients, plan.federation.num_shards
    if shards < clients:
        raise UsageError(f"{clients} clients need as many shards, but num-shards is {shards}.")


def _budgets_time(hyper: Any, run: RunSettings) -> bool:
    """Whether clients do less, or take a smaller network, where their time is short."""
    sizes = [text.strip() for text in f"{run.widths},{run.depths}".split(",")]
    return getattr(hyper, "work", None) == "budget" or "auto" in sizes


def named_here(plan: Plan) -> str:
    """What the command line named of code and files, for the processes that it starts (``allow``)."""
    federation = plan.federation
    models = model_cycle(plan) if plan.local is not None else []
    data = [federation.dataset, public_parts(federation)[0], *partition_specs(federation)]
    own = [
        spec
        for spec in [*data, federation.model, *models]
        if split(spec)[0] in OF_FILES or any(code_of(kind, spec) for kind in OWN_CODE)
    ]
    return ";".join(dict.fromkeys([*listed(plan.data.allow), *own]))


def client_models(plan: Plan) -> list[str]:
    """The model of each local client, in client order."""
    assert plan.local is not None
    models = model_cycle(plan)
    return [models[at % len(models)] for at in range(plan.local.clients)]


def model_cycle(plan: Plan) -> list[str]:
    """The models of local clients, which take them in turn."""
    assert plan.local is not None
    if plan.strategy.one_model:
        return [plan.federation.model]
    return _model_names(plan.local.models)


def _model_names(text: str) -> list[str]:
    models: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        # A comma may also stand within an argument, as in mlp:200,200 or heterofl-cnn:0.5,group.
        if models and ":" in models[-1] and ":" not in piece and piece not in names("models"):
            models[-1] += f",{piece}"
        else:
            models.append(piece)
    if not models:
        raise UsageError("models names no model.")
    return models


def _implied(strategy: type[FederatedStrategy], preset: str) -> dict[str, Value]:
    own = {key(item.name) for item in fields(FederationSettings)}
    return {name: value for name, value in strategy.PRESETS[preset].items() if name in own}


def _security(values: Mapping[str, Value], server: ServerSettings, local: bool) -> ServerSecurity:
    if not local:
        security = build(ServerSecurity, values)
        check_server(server.listen, security)
        return security
    if not is_loopback(server.listen):
        raise UsageError(
            f"`fedkit run` stays on this machine and can't listen on {server.listen}: give --listen "
            "127.0.0.1:0, or start a `fedkit server` and clients of its own."
        )
    # A server's settings may be run again locally, where its certificates are of no use.
    return ServerSecurity()


def _check_address(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"listen takes HOST:PORT, as in 127.0.0.1:8090, not {text!r}.")


def _check_local(federation: FederationSettings, run: RunSettings) -> None:
    from fedkit.registry import check

    if split(federation.dataset)[0] == OWN:
        raise UsageError(
            "`fedkit run` deals one data set among its clients; for clients with data of their own "
            "start `fedkit server` and `fedkit client --dataset folder:PATH`."
        )
    if federation.min_clients > run.clients:
        raise UsageError(
            f"min-clients is {federation.min_clients}, but only {run.clients} clients are started."
        )
    for name in _model_names(run.models):
        check("models", name)
    if run.emulate:
        profiles(run.emulate)
    for texts, read in (
        (run.widths, read_width),
        (run.depths, read_depth),
        (run.time_budgets, read_seconds),
    ):
        for text in texts.split(",") if texts else ():
            read(text.strip())
    for text in run.corrupt.split(","):
        read_noise(text.strip())
