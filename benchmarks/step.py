"""A step of local training as fedkit takes it, beside a plain PyTorch loop, in one run.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--networks lenet,cnn] [--batch 32] [--size 28]

The plain one has the same weights and batches, ``nn.MaxPool2d``, inputs that were normalised before, and
SGD as torch makes it. Both take turns; the figures are medians of rounds of 20 steps.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedkit.data.samples import Samples
from fedkit.models.build import build_model
from fedkit.models.losses import cross_entropy
from fedkit.models.training import make_optimiser, take_steps

STEPS, CLASSES, RATE = 20, 10, 0.01


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="lenet,cnn,cnn1,heterofl-cnn:0.25")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=28, help="of the images, in pixels")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, Python "
        f"{platform.python_version()}, torch {version('torch')}; batches of {options.batch}\n"
    )
    print("| network | plain, ms a step | fedkit, ms a step | |\n|---|---|---|---|")
    for name in options.networks.split(","):
        sides = _sides(name, options.size, options.batch)
        taken: list[list[float]] = [[] for _ in sides]
        for turn in range(options.turns + 2):
            for side, seconds in zip(sides, taken, strict=True):
                began = time.perf_counter()
                side(turn)
                seconds.append(1000 * (time.perf_counter() - began) / STEPS)
        plain, ours = (statistics.median(seconds[2:]) for seconds in taken)
        print(f"| {name} | {plain:.2f} | {ours:.2f} | {ours / plain - 1:+.0%} |")


def _sides(name: str, size: int, batch: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
    count, rng = STEPS * batch, np.random.default_rng(1)
    # Smooth, as pictures are: of noise a processor guesses less.
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 1, size // 4, size // 4))).float()
    images = functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)
    labels = torch.from_numpy(rng.integers(0, CLASSES, count))
    samples = Samples(images, labels, torch.tensor([127.0]), torch.tensor([64.0]))
    ours = build_model(name, (1, size, size), CLASSES, seed=1)
    plain, inputs = _plain(ours), samples.inputs(slice(None))

    def order(turn: int) -> tuple[torch.Tensor, ...]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(turn)).split(batch)

    def plainly(turn: int) -> None:
        optimiser = torch.optim.SGD(plain.parameters(), RATE)
        plain.train()
        for some in order(turn):
            optimiser.zero_grad()
            functional.cross_entropy(plain(inputs[some]), labels[some]).backward()
            optimiser.step()

    def as_fedkit_does(turn: int) -> None:
        optimiser = make_optimiser("sgd", ours, RATE)
        take_steps(ours, samples, labels, cross_entropy, optimiser, order(turn))

    return plainly, as_fedkit_does


def _plain(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for name, module in other.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(other, name, nn.MaxPool2d(2))
    return other


if __name__ == "__main__":
    main()
