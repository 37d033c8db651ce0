"""One side of ``simulation.py`` in a process of its own: bare PyTorch, fedkit, or Flower on Ray.

Each does the same: every client loads the global LeNet, takes some SGD steps of a batch on its samples,
and gives the weights back. It prints a line of JSON: ``first`` (seconds from a call, with all imported, to
the end of its first round) and ``rounds`` (seconds of each later one).
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimiser imports it, for seconds: no part of a round of any side
from torch.nn import functional

from fedkit.data.splits import FederatedData, cut
from fedkit.engine.events import Event
from fedkit.engine.plan import Plan, make_plan
from fedkit.models.build import build_model
from fedkit.simulation.run import simulate
from fedkit.simulation.settings import WorkerSettings

RATE = 0.01


def plan_of(work: dict[str, Any], folder: str) -> Plan:
    """The federation that all sides are: FedAvg of LeNets, as fedkit's settings have it."""
    steps = {"local-steps": work["steps"]} if work["steps"] else {"local-epochs": 0}
    values = {
        "strategy": "fedavg",
        "model": "lenet",
        "dataset": work["dataset"],
        "data-root": work["data_root"],
        "partition": "iid",
        "clients": work["clients"],
        "rounds": work["rounds"] + 1,
        "batch-size": work["batch"],
        "optimiser": "sgd",
        "learning-rate": RATE,
        "momentum": 0.0,
        "weight-decay": 0.0,
        "alone": False,
        "eval-every": 10_000,
        "eval-samples": 1,
        "run-dir": f"{folder}/run",
        **steps,
    }
    return make_plan(values, local=True)


class Client:
    """A client as anybody would write it: tensors that were normalised before, and a plain loop."""

    def __init__(self, data: FederatedData, number: int) -> None:
        train = data.shard(number).train
        self._inputs, self._labels = train.inputs(slice(None)), train.labels
        self.shape, self.outputs, self.samples = data.shape, data.outputs, len(train)

    def train(self, model: torch.nn.Module, steps: int, batch: int) -> None:
        """So many steps, in a new order for each pass."""
        optimiser = torch.optim.SGD(model.parameters(), RATE)
        model.train()
        rows = self._rows(batch)
        for _ in range(steps):
            some = next(rows)
            optimiser.zero_grad()
            functional.cross_entropy(model(self._inputs[some]), self._labels[some]).backward()
            optimiser.step()

    def _rows(self, batch: int) -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(len(self._labels)).split(batch)


def network(shape: tuple[int, ...], outputs: int) -> torch.nn.Module:
    """The LeNet, pooled by torch as anybody would."""
    model = build_model("lenet", shape, outputs, seed=1)
    for name, module in model.named_children():
        if isinstance(module, torch.nn.MaxPool2d):
            setattr(model, name, torch.nn.MaxPool2d(2))
    return model


def bare(work: dict[str, Any], folder: str) -> dict[str, Any]:
    """One process for each core, of one thread, which trains its share of the clients in memory."""
    context = multiprocessing.get_context("fork")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as shares:
        starts = [context.Barrier(work["cores"] + 1) for _ in range(2)]
        processes = [
            context.Process(target=_bare_share, args=(work, shares, at, starts), daemon=True)
            for at in range(work["cores"])
        ]
        for process in processes:
            process.start()
        seconds = []
        for _ in range(work["rounds"] + 1):
            starts[0].wait()
            round_began = time.perf_counter()
            starts[1].wait()
            seconds.append(time.perf_counter() - round_began)
            if len(seconds) == 1:
                first = time.perf_counter() - began
        for process in processes:
            process.join()
    return {"first": first, "rounds": seconds[1:]}


def _bare_share(work: dict[str, Any], folder: str, at: int, starts: list[Any]) -> None:
    torch.set_num_threads(1)
    data = _data(json.dumps(work), folder)
    clients = [Client(data, one) for one in range(at, work["clients"], work["cores"])]
    model = network(data.shape, data.outputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(work["rounds"] + 1):
        starts[0].wait()
        for client in clients:
            model.load_state_dict(weights)
            client.train(model, work["steps"], work["batch"])
        starts[1].wait()


def fedkit(work: dict[str, Any], folder: str) -> dict[str, Any]:
    """``fedkit simulate``, as its command calls it."""
    for module in ("driver", "facts", "checkpoint", "resume"):
        importlib.import_module(f"fedkit.engine.{module}")
    for module in ("fedkit.simulation.grid", "strategies.fedavg", "clients.fedavg"):
        importlib.import_module(module)
    ends: list[float] = []
    seconds: list[float] = []

    def listen(event: Event) -> None:
        if event.event == "exchange" and event.exchange == "train":
            ends.append(time.perf_counter())
            seconds.append(event.value)

    plan, settings = plan_of(work, folder), WorkerSettings(work["cores"], keep_models=False)
    began = time.perf_counter()
    simulate(plan, settings, [listen])
    return {"first": ends[0] - began, "rounds": seconds[1:]}


def ray(work: dict[str, Any], folder: str) -> dict[str, Any]:
    """Flower's own simulation on Ray, with its FedAvg and a client in the form of its quickstart."""
    from flwr.app import ArrayRecord, Context, MetricRecord
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from simulation_ray import client_app

    logging.getLogger("flwr").setLevel(logging.ERROR)
    data = _data(json.dumps(work), folder)
    model = network(data.shape, data.outputs)
    everybody, ends = work["clients"], []

    def took(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        ends.append(time.perf_counter())
        return None

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=everybody, min_available_nodes=everybody
        )
        start = ArrayRecord(model.state_dict())
        strategy.start(grid, start, num_rounds=work["rounds"] + 1, evaluate_fn=took)

    began = time.perf_counter()
    os.environ["SIMULATION_WORK"] = json.dumps({**work, "folder": folder})
    run_simulation(
        server,
        client_app,
        everybody,
        backend_config={
            "init_args": {"num_cpus": work["cores"], "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    later = [after - before for before, after in pairwise(ends[1:])]
    return {"first": ends[1] - began, "rounds": later}


@cache
def _data(work: str, folder: str) -> FederatedData:
    plan = plan_of(json.loads(work), folder)
    return cut(plan.federation, plan.data)


@cache
def client_of(work: str, folder: str, number: int) -> Client:
    """A client's samples, once in a process."""
    return Client(_data(work, folder), number)


SIDES = {"bare": bare, "fedkit": fedkit, "ray": ray}


def main() -> None:
    """Be the side that the first word names; the second is the work, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("work", type=json.loads)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(SIDES[options.side](options.work, folder)))


if __name__ == "__main__":
    main()
