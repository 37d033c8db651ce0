"""What a run would do: who gets which model and shard, what travels, what it needs. Starts nothing."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import nn

from fedkit.data.splits import cut
from fedkit.engine.local_clients import local_clients
from fedkit.engine.plan import Plan, check_shards
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.models.build import build_model, parameter_count, state_bytes
from fedkit.models.narrow import at_width
from fedkit.models.normalisation import normalisation_of, statistics_of
from fedkit.report import size, wide_console


def dry_run(plan: Plan) -> dict[str, Any]:
    """The plan of a local run: a row for each client, and the sums.

    ``memory`` is what a client's models need while they train: weights, gradients and two moments, in
    bytes, and the weights once more for the reference; activations and torch itself come on top.
    """
    check_shards(plan)
    settings = plan.federation
    data = cut(settings, plan.data)
    widest = plan.strategy.width(plan.hyper, settings, 0, 1.0) or 1.0
    spec = at_width(plan.strategy.network(settings.model), widest)
    common = network_size(build_model(spec, data.shape, data.outputs, settings.seed))
    rows = []
    for one in local_clients(plan):
        client = one.number
        # How wide or deep auto is, only the device can tell.
        name = plan.strategy.network(one.model, int(one.depth) if one.depth.isdecimal() else None)
        share = float(one.width.replace("auto", "1")) if one.width else None
        name = at_width(name, plan.strategy.width(plan.hyper, settings, client, share) or 1.0)
        model = build_model(name, data.shape, data.outputs, settings.seed, client)
        own, codec = network_size(model), settings.codec.split(",")[0].strip()
        sizes = Sizes(own, common, data.outputs, len(data.public), codec)
        up, down = plan.strategy.traffic(plan.hyper, sizes)
        shard = data.shard(client)
        rows.append(
            {
                "client": client,
                "model": name,
                "shard": client,
                "samples": len(shard.train),
                "parameters": parameter_count(model),
                "bytes_up": up,
                "bytes_down": down,
                "memory": own.bytes * (5 if settings.alone else 4),
            }
        )
    return {
        "strategy": settings.strategy,
        "preset": plan.hyper.preset,
        "rounds": settings.rounds,
        "dataset": settings.dataset,
        "partition": settings.partition,
        "public": settings.public,
        "clients": rows,
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
    }


def network_size(model: nn.Module) -> NetworkSize:
    """What a network weighs, and which part of it may not travel."""
    state, layers = model.state_dict(), normalisation_of(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dtype == torch.float32}
    return NetworkSize(
        bytes=state_bytes(model),
        parameters=tuple(shape for name, shape in shapes.items() if name not in layers),
        normalisation=tuple(shape for name, shape in shapes.items() if name in layers),
        statistics=sum(state[name].nbytes for name in statistics_of(model)),
    )


def print_plan(planned: dict[str, Any]) -> None:
    """The plan as a table."""
    console = wide_console()
    table = Table(title=f"{planned['strategy']} (preset {planned['preset']}), a round of it")
    for name in ("client", "model", "shard", "samples", "parameters", "up", "down", "memory"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in planned["clients"]:
        table.add_row(
            str(row["client"]),
            row["model"],
            str(row["shard"]),
            str(row["samples"]),
            f"{row['parameters']:,}",
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            size(row["memory"]),
        )
    console.print(table)
    console.print(
        f"{planned['rounds']} rounds on {planned['dataset']}, {planned['partition']}, public set "
        f"{planned['public']}: {size(planned['bytes_up'])} up and {size(planned['bytes_down'])} "
        "down a round, over all clients",
        soft_wrap=True,
    )
