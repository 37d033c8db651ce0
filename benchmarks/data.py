"""How fast a shard is read, and how near training comes to a bare loop, side by side in one run.

    python benchmarks/data.py --data-root ~/data
    python benchmarks/data.py --dataset digits --models lenet --repeats 5

*Reading*: epochs over one shard in shuffled, normalised (and with ``--augment`` augmented) float32
batches, against a torchvision ``Dataset`` with the same transforms in a ``DataLoader``. *Training*:
``fedkit.models.training`` on a shard as a client holds it (bytes, normalised batch by batch), against a
bare PyTorch loop over float32 tensors that were normalised before. Each pair takes turns; the figures
are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fedkit.data.augment import augmentation
from fedkit.data.datasets import open_dataset
from fedkit.data.samples import Samples
from fedkit.models.build import build_model
from fedkit.models.losses import cross_entropy
from fedkit.models.training import make_optimiser, one_epoch, take_steps
from fedkit.settings import DataSettings


def main() -> None:
    """Measure and print both tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"settings": vars(options), "versions": _versions()}
    shards = {name: _shard(name, options) for name in options.dataset.split(",")}
    results["reading"] = [
        _compare(f"{name}{' ' + augment if augment != 'none' else ''}", *pair, options)
        for name, shard in shards.items()
        for augment in ("none", options.augment)
        if augment == "none" or shard.shape[0] == 3
        for pair in [_readers(shard, augment, options.batch)]
    ]
    results["training"] = [
        _compare(f"{name} {model}", *_trainers(shard, model, options.batch), options)
        for name, shard in shards.items()
        for model in options.models.split(",")
    ]
    _print("Reading an epoch", "torchvision", results["reading"])
    _print("Training an epoch", "bare loop", results["training"])
    print("\n" + ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, default=str) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist,cifar10", help="comma-separated")
    parser.add_argument("--models", default="lenet,cnn,resnet18", help="to train; comma-separated")
    parser.add_argument(
        "--augment", default="crop:4,flip", help="for the second reading of RGB sets"
    )
    parser.add_argument("--samples", type=int, default=2000, help="in the shard")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-root", default="")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser.parse_args()


def _shard(name: str, options: argparse.Namespace) -> Samples:
    sources = DataSettings(options.data_root, allow_checksum_mismatch=True)
    pool = open_dataset(name, sources).train
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    return pool.take(order[: options.samples])


class _AsTorchvision(Dataset[tuple[Any, int]]):
    """The shard as torchvision's own classes hold and serve it: an array, a PIL image a sample."""

    def __init__(self, shard: Samples, transform: Callable[[Any], Any]) -> None:
        images = shard.data.permute(0, 2, 3, 1).numpy()
        self._images = images[..., 0] if images.shape[-1] == 1 else images
        self._labels = shard.labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[at])), self._labels[at]


def _readers(
    shard: Samples, augment: str, batch: int
) -> tuple[Callable[[], None], Callable[[], None], int]:
    steps: list[Any] = []
    if augment != "none":
        steps = [
            transforms.RandomCrop(shard.shape[1], padding=4),
            transforms.RandomHorizontalFlip(),
        ]
    mean, std = (shard.mean / 255).tolist(), (shard.std / 255).tolist()
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])
    theirs = DataLoader(_AsTorchvision(shard, transform), batch_size=batch, shuffle=True)
    ours = replace(shard, augment=augmentation(augment, shard.shape))
    generator = torch.Generator().manual_seed(0)

    def read_ours() -> None:
        _use(
            (ours.training_inputs(rows), ours.labels[rows])
            for rows in one_epoch(len(ours), batch, generator)
        )

    return read_ours, lambda: _use(theirs), len(shard)


def _use(batches: Iterable[Any]) -> None:
    for _ in batches:
        continue


def _trainers(
    shard: Samples, name: str, batch: int
) -> tuple[Callable[[], None], Callable[[], None], int]:
    classes = int(shard.labels.max()) + 1
    inputs, labels = shard.inputs(slice(None)), shard.labels

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build_model(name, shard.shape, classes, seed=1)
        return model, make_optimiser("sgd", model, 0.01)

    ours, our_optimiser = fresh()
    bare, bare_optimiser = fresh()
    generator = torch.Generator().manual_seed(0)

    def train_ours() -> None:
        batches = one_epoch(len(shard), batch, generator)
        take_steps(ours, shard, labels, cross_entropy, our_optimiser, batches)

    def train_bare() -> None:
        bare.train()
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(labels), batch):
            rows = order[at : at + batch]
            bare_optimiser.zero_grad()
            functional.cross_entropy(bare(inputs[rows]), labels[rows]).backward()
            bare_optimiser.step()

    return train_ours, train_bare, len(shard)


def _compare(
    name: str,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    count: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    ours(), theirs()  # the first call of each loads and allocates
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.repeats):
        for kept, work in zip(seconds, (ours, theirs), strict=True):
            started = time.perf_counter()
            work()
            kept.append(time.perf_counter() - started)
    rates = [count / statistics.median(each) for each in seconds]
    return {
        "what": name,
        "ours": rates[0],
        "theirs": rates[1],
        "ratio": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "seconds": seconds,
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _print(title: str, other: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title} (samples a second)\n{'':24}{'fedkit':>12}{other:>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['what']:24}{row['ours']:12,.0f}{row['theirs']:14,.0f}{row['ratio']:8.2f}")


if __name__ == "__main__":
    main()
