"""Memory that training is said to take beside what torch's CPU allocator had out at most.

    python benchmarks/memory.py
    python benchmarks/memory.py resnet18:3x32x32:32 lstm:64:80:16

Each word is MODEL:SHAPE:BATCH; one number as a shape is a length of sequences. Measured is the second step
with Adam, by torch's profiler, which sees every tensor and what operations ask the allocator for; weights
and moments are added. Figures are in MB (a million bytes).
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from fedkit.models.build import build_model
from fedkit.models.cost import training_memory

CASES = (
    "lenet:1x28x28:64",
    "cnn:3x32x32:64",
    "resnet18:3x32x32:32",
    "preresnet18:0.25:3x32x32:32",
    "shufflenet:0.5:3x32x32:32",
    "mobilenet_v2:3x32x32:32",
    "vit:3x32x32:32",
    "transformer:80:32",
    "lstm:80:32",
)
CLASSES = 80


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(f"{'model':<18} {'samples':>10} {'batch':>5} {'said':>7} {'measured':>8} {'ratio':>6}")
    for case in sys.argv[1:] or CASES:
        spec, shape_text, batch_text = case.rsplit(":", 2)
        shape = tuple(int(size) for size in shape_text.split("x"))
        batch = int(batch_text)
        dtype = torch.int64 if len(shape) == 1 else torch.float32
        said = training_memory(spec, shape, CLASSES, batch, dtype)
        found = measured(
            build_model(spec, shape, CLASSES, seed=1), torch.zeros(batch, *shape, dtype=dtype)
        )
        print(
            f"{spec:<18} {shape_text:>10} {batch:>5} {said / 1e6:>7.1f} {found / 1e6:>8.1f} "
            f"{said / found:>6.2f}"
        )


def measured(model: nn.Module, inputs: torch.Tensor) -> int:
    """Bytes at the peak of a step, with the batch, weights, buffers and moments."""
    optimiser = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimiser.zero_grad()
        labels = torch.zeros(len(inputs), dtype=torch.int64)
        functional.cross_entropy(model(inputs), labels).backward()
        optimiser.step()

    step()
    optimiser.zero_grad()
    held = [inputs, *model.state_dict().values(), *model.parameters(), *model.parameters()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in held)


if __name__ == "__main__":
    main()
