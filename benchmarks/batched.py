"""Clients that train as one batched model beside the same clients one after the other.

    OMP_NUM_THREADS=1 python benchmarks/batched.py
    OMP_NUM_THREADS=1 python benchmarks/batched.py lenet:1x8x8:16:20 mlp:32:1x8x8:16:50

Each word is MODEL:SHAPE:BATCH:CLIENTS. A client update is four steps of SGD; told are client updates in a
second of this process's time on the processor (so that a busy machine tells the same), the best of seven
turns, in which the two ways alternate, and the largest difference between their weights at the end.
"""

from __future__ import annotations

import sys
import time

import torch

from fedkit.data.samples import Samples
from fedkit.models.batched import examine, train_batched
from fedkit.models.build import build_model
from fedkit.models.losses import cross_entropy
from fedkit.models.training import Steps, make_optimiser, one_by_one, one_epoch
from fedkit.seeds import torch_generator

CASES = (
    "logistic:1x8x8:16:10",
    "logistic:1x8x8:16:50",
    "mlp:32:1x8x8:16:50",
    "mlp:1x8x8:16:20",
    "mlp:1x28x28:16:20",
    "lenet:1x8x8:16:8",
    "lenet:1x8x8:16:32",
    "lenet:batch:1x8x8:16:20",
    "lenet:group:1x8x8:16:20",
    "cnn:1x8x8:16:10",
    "lenet:1x28x28:32:20",
    "cnn:1x28x28:32:10",
)
CLASSES, STEPS, TURNS = 10, 4, 7


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(f"{'case':<24} {'one by one':>10} {'batched':>8} {'gain':>5} {'difference':>10}")
    for case in sys.argv[1:] or CASES:
        spec, shape_text, batch, count = case.rsplit(":", 3)
        shape = tuple(int(size) for size in shape_text.split("x"))
        alone, together = (
            [client(spec, shape, int(batch), at) for at in range(int(count))] for _ in range(2)
        )
        verdict = examine(together[0])
        if verdict.why_not:
            print(f"{case:<24} can't be batched, since {verdict.why_not}")
            continue
        slow, fast = [], []
        for _ in range(TURNS):
            began = time.process_time()
            for each in alone:
                one_by_one(each)
            slow.append(time.process_time() - began)
            began = time.process_time()
            train_batched(together, mixes=verdict.mixes)
            fast.append(time.process_time() - began)
        print(
            f"{case:<24} {len(alone) / min(slow):>10.0f} {len(together) / min(fast):>8.0f} "
            f"{min(slow) / min(fast):>5.2f} {difference(alone, together):>10.1e}",
            flush=True,
        )


def client(spec: str, shape: tuple[int, ...], batch: int, number: int) -> Steps:
    """What a client asks for, over and over: the same batches from where its weights are."""
    draw = torch_generator(1, "benchmark", number)
    count = STEPS * batch
    data = torch.randint(256, (count, *shape), generator=draw, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    channels = shape[0]
    samples = Samples(data, labels, torch.full((channels,), 127.0), torch.full((channels,), 74.0))
    model = build_model(spec, shape, CLASSES, seed=number)
    optimiser = make_optimiser("sgd", model, 0.01, momentum=0.9)
    batches = list(one_epoch(count, batch, draw))
    return Steps(model, samples, (labels,), cross_entropy, optimiser, batches)


def difference(some: list[Steps], others: list[Steps]) -> float:
    """The largest one between the weights of pairs."""
    return max(
        float((one - other).detach().abs().max())
        for a, b in zip(some, others, strict=True)
        for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True)
    )


if __name__ == "__main__":
    main()
