"""``fedkit client``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli import flower_app, terminal
from fedkit.cli.options import LOCAL_SERVER, Server, checked_address, with_settings
from fedkit.errors import UsageError
from fedkit.models.budget import read_bytes, read_depth, read_seconds, read_width
from fedkit.security.settings import ClientSecurity, check_client, resolve_token
from fedkit.settings import DataSettings

EXAMPLES = """\b
Examples:
  fedkit client --model resnet18 --data-shard 3
  fedkit client --model resnet18 --dataset folder:~/pictures --memory-budget 2GB
  fedkit client --model my_networks:tiny --data-shard 0
  fedkit client --data-shard 4 --tag lab --emulate pi4
  fedkit client --data-shard 3 --width 0.25
  fedkit client --data-shard 3 --width auto --memory-budget 64MB --time-budget 20
  fedkit client --data-shard 6 --depth auto --memory-budget 64MB
  fedkit client --data-shard 5 --time-budget 20 --corrupt noise:1.0
  fedkit client --data-shard auto --server 10.0.0.5:8090 --root-certificates ca.pem
  fedkit client --model lenet --data-shard 2 --state-dir /var/lib/fedkit --stay
  fedkit client --model lenet --data-shard 1 --server 10.0.0.5:8090 --root-certificates ca.pem \\
      --ssl-certfile drone-1.pem --ssl-keyfile drone-1.key --token-file drone-1.token
  fedkit client --app ~/quickstart-pytorch --node-config "partition-id=0 num-partitions=2"
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Take part in a federation as one device.")(client)


@with_settings(ClientSecurity, DataSettings)
def client(
    model: Annotated[
        str | None,
        typer.Option(
            help="Its network: see `fedkit list models`, or a function of your own, "
            "package.module:factory.  [default: the federation's]"
        ),
    ] = None,
    data_shard: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            help="Which shard of the federation's data set it holds, counted from 0; auto takes a free "
            "one.",
        ),
    ] = None,
    server: Server = LOCAL_SERVER,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Without --data-shard: its own data, all of it, as in folder:PATH. With: refuse a "
            "federation on another data set."
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="Refuse a federation that deals data otherwise, e.g. dirichlet:0.5."),
    ] = None,
    num_shards: Annotated[
        int | None, typer.Option(help="Refuse a federation with another number of shards.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where it computes: auto, cpu, cuda, cuda:I or mps.  [default: auto]",
            show_default=False,
        ),
    ] = "auto",
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A word by which the server may choose it (--select tag:NAME); may be repeated.  "
            "[default: none]",
            show_default=False,
        ),
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Behave like another device (slower, on a thinner line, at times away): pi4, "
            "jetson-nano, phone-mid, laptop, or a TOML file.  [default: this machine as it is]",
            show_default=False,
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where it keeps its identity and its model.  [default: fedkit-state/shard-NUMBER]",
            show_default=False,
        ),
    ] = None,
    max_wait_time: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Go on trying to reach the server for so long.  [default: 30 seconds, and 10 minutes "
            "once it has taken part]",
            show_default=False,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Refuse to train a network that needs more, as in 512MB or 2GiB.",
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|auto",
            help="Train this share of the channels of every layer, as in 0.25; auto takes the widest level "
            "within the budgets, by measured memory and time (heterofl; depthfl takes a "
            "number).  [default: what the server gives]",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            help="Train the first NUMBER stages of the network, each with an exit; auto takes as many as "
            "the budgets allow (strategy depthfl).  [default: all]",
            show_default=False,
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="So long may a round's local training take: FedProx with work=budget then does fewer "
            "epochs, and --width auto and --depth auto a smaller network.  [default: no limit]",
            show_default=False,
        ),
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Option(
            metavar="noise:SIGMA",
            help="A broken sensor, to see what becomes of a federation with one: Gaussian noise on this "
            "client's own inputs, in standard deviations of the data set.  [default: none]",
            show_default=False,
        ),
    ] = None,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay",
            help="When a run is over, wait for the next; wait for a server for as long as it takes.",
        ),
    ] = False,
    reset_state: Annotated[
        bool,
        typer.Option(
            "--reset-state", help="First move what the state directory keeps aside, and begin anew."
        ),
    ] = False,
    app: flower_app.App = None,
    node_config: flower_app.NodeConfig = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Take part in a federation as one device; every other setting comes from the server."""
    from fedkit.data.corruption import NONE, read_noise
    from fedkit.data.names import check_dataset
    from fedkit.devices.profiles import profile
    from fedkit.engine.client import Client, ClientPlan
    from fedkit.registry import allow, check
    from fedkit.settings import as_config, build

    terminal.end_with_parent()
    if max_wait_time is not None and not math.isfinite(max_wait_time):
        raise UsageError(f"--max-wait-time takes a number of seconds, not {max_wait_time}.")
    security = build(ClientSecurity, settings)
    check_client(checked_address(server), security)
    connection: dict[str, Any] = {
        "server": server,
        "state_dir": state_dir,
        "max_wait": max_wait_time,
        "stay": stay,
        "reset_state": reset_state,
        "security": security,
        "token": resolve_token(security),
    }
    if app is not None:
        own = {
            "model": model,
            "data-shard": data_shard,
            "dataset": dataset,
            "partition": partition,
            "num-shards": num_shards,
            "device": device if device != "auto" else None,
            "tag": tag,
            "emulate": emulate,
            "memory-budget": memory_budget,
            "width": width,
            "depth": depth,
            "time-budget": time_budget,
            "corrupt": corrupt,
            **{name: settings.get(name) for name in as_config(DataSettings())},
        }
        flower_app.refuse_with_app(name for name, value in own.items() if value is not None)
        flower_app.client(app, node_config, connection)
        return
    flower_app.refuse_without_app(node_config=node_config)
    broken = "" if corrupt is None or corrupt == NONE else corrupt
    read_noise(broken)
    sources = build(DataSettings, settings)
    allow(*(spec for spec in (model, dataset, partition) if spec is not None))
    if model is not None:
        check("models", model)
    if dataset is not None:
        check_dataset(dataset)
    if partition is not None:
        check("partitions", partition)
    plan = ClientPlan(
        shard=_shard(data_shard, dataset),
        own_dataset=dataset if data_shard is None else None,
        memory_budget=read_bytes(memory_budget) if memory_budget is not None else 0,
        width=read_width(width) if width is not None else "",
        depth=read_depth(depth) if depth is not None else "",
        time_budget=read_seconds(time_budget) if time_budget is not None else 0.0,
        corrupt=broken,
        model=model,
        device=device,
        tags=_tags(tag or []),
        emulate=profile(emulate) if emulate is not None else None,
        expected={
            "dataset": dataset if data_shard is not None else None,
            "partition": partition,
            "num-shards": num_shards,
        },
        data=sources,
        **connection,
    )
    one = Client(plan)
    try:
        goodbye = one.run()
    except KeyboardInterrupt:
        print(f"Stopped; what this device keeps is in {one.state_path}.", file=sys.stderr)
        raise
    if not terminal.quiet:
        print(goodbye)
        if one.model_path:
            print(f"The model is in {one.model_path}.")


def _tags(words: list[str]) -> tuple[str, ...]:
    for word in words:
        if not word.isprintable() or "," in word or not 0 < len(word) <= 100:
            raise UsageError(
                f"--tag takes a word of 1 to 100 characters without a comma, not {word!r}; give "
                "the option once for each."
            )
    return tuple(dict.fromkeys(words))


def _shard(text: str | None, dataset: str | None) -> int | None:
    if text is None and dataset is None:
        raise UsageError(
            "Which data does this client have? Give --data-shard NUMBER for a shard of the "
            "federation's data set, --data-shard auto for the next free one, or --dataset for data of "
            "its own, as in --dataset folder:PATH."
        )
    if text is None or text == "auto":
        return None
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"--data-shard takes a number or auto, not {text!r}.") from None
    if number < 0:
        raise UsageError(f"Shards count from 0: there is no shard {number}.")
    return number
