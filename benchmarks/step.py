"""Steps of local training, and predictions, as fedkit makes them, beside a plain PyTorch loop, in one run.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--networks lenet,cnn] [--batch 32] [--shape 1x28x28]

The plain one has the same weights and batches, ``nn.MaxPool2d``, inputs that were normalised before, SGD as
torch makes it, and the allocator as it is. Each side has a process of its own, and they take turns; the
figures are medians of rounds of 20 steps, and of predicting 20 batches of 64 images.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedkit.data.samples import Samples
from fedkit.models.build import build_model
from fedkit.models.device import compute_with
from fedkit.models.losses import cross_entropy
from fedkit.models.measure import CPU_BATCH, predict
from fedkit.models.training import make_optimiser, take_steps

STEPS, CLASSES, RATE = 20, 10, 0.01
KINDS = ("train", "predict")
# A network, samples to train with and to predict, a batch -> what is done in a turn, by kind.
Side = Callable[[nn.Module, Samples, Samples, int], dict[str, Callable[[int], object]]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="lenet,cnn,cnn1,heterofl-cnn:0.25")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shape", default="1x28x28", help="of an image")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, Python "
        f"{platform.python_version()}, torch {version('torch')}; batches of {options.batch}, "
        f"images of {options.shape}\n"
    )
    print("| network | plain, ms a step | fedkit | | plain, ms to predict 64 | fedkit | |")
    print("|---|---|---|---|---|---|---|")
    for name in options.networks.split(","):
        plain, ours = _measured(name, options)
        figures = (
            f"{plain[kind]:.2f} | {ours[kind]:.2f} | {ours[kind] / plain[kind] - 1:+.0%}"
            for kind in KINDS
        )
        print(f"| `{name}` | {' | '.join(figures)} |", flush=True)


def _measured(name: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of the plain side and of fedkit's, for each kind of work."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), [], []
    shape = tuple(int(size) for size in options.shape.split("x"))
    for side in (_plain_side, _fedkit_side):
        mine, theirs = spawn.Pipe()
        processes.append(
            spawn.Process(target=_side, args=(theirs, side, name, shape, options.batch))
        )
        processes[-1].start()
        pipes.append(mine)
    taken: list[dict[str, list[float]]] = [{kind: [] for kind in KINDS} for _ in pipes]
    for turn in range(options.turns + 2):
        for pipe, seconds in zip(pipes, taken, strict=True):
            for kind in KINDS:
                pipe.send((kind, turn))
                seconds[kind].append(1000 * pipe.recv() / STEPS)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.close()
        process.join()
    return [{kind: statistics.median(times[2:]) for kind, times in one.items()} for one in taken]


def _side(pipe: Connection, side: Side, name: str, shape: tuple[int, ...], batch: int) -> None:
    """The life of one side's process: do what it is told, and tell the seconds."""
    torch.set_num_threads(1)
    work = side(build_model(name, shape, CLASSES, seed=1), *_samples(shape, batch), batch)
    while True:
        try:
            kind, turn = pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        work[kind](turn)
        pipe.send(time.perf_counter() - began)


def _samples(shape: tuple[int, ...], batch: int) -> list[Samples]:
    """To train with and to predict."""
    rng, (channels, height, width) = np.random.default_rng(1), shape
    # Smooth, as pictures are: of noise a processor guesses less.
    coarse = rng.integers(
        0, 256, (STEPS * max(batch, CPU_BATCH), channels, height // 4, width // 4)
    )
    images = functional.interpolate(
        torch.from_numpy(coarse).float(), size=(height, width), mode="bilinear"
    ).to(torch.uint8)
    labels = torch.from_numpy(rng.integers(0, CLASSES, len(images)))
    whole = Samples(images, labels, torch.full((channels,), 127.0), torch.full((channels,), 64.0))
    return [whole.take(torch.arange(STEPS * size)) for size in (batch, CPU_BATCH)]


def _order(turn: int, count: int, batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(turn)).split(batch)


def _plain_side(
    model: nn.Module, train: Samples, test: Samples, batch: int
) -> dict[str, Callable[[int], object]]:
    plain, inputs, tested = _plain(model), train.inputs(slice(None)), test.inputs(slice(None))

    def steps(turn: int) -> None:
        optimiser = torch.optim.SGD(plain.parameters(), RATE)
        plain.train()
        for some in _order(turn, len(train), batch):
            optimiser.zero_grad()
            functional.cross_entropy(plain(inputs[some]), train.labels[some]).backward()
            optimiser.step()

    @torch.inference_mode()
    def predictions(_: int) -> torch.Tensor:
        plain.eval()
        return torch.cat([plain(some) for some in tested.split(CPU_BATCH)])

    return {"train": steps, "predict": predictions}


def _fedkit_side(
    model: nn.Module, train: Samples, test: Samples, batch: int
) -> dict[str, Callable[[int], object]]:
    compute_with(1)

    def steps(turn: int) -> None:
        optimiser = make_optimiser("sgd", model, RATE)
        order = _order(turn, len(train), batch)
        take_steps(model, train, train.labels, cross_entropy, optimiser, order)

    return {"train": steps, "predict": lambda _: predict(model, test)}


def _plain(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for name, module in other.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(other, name, nn.MaxPool2d(2))
    return other


if __name__ == "__main__":
    main()
