"""What a network costs, against counts by hand, published figures and the real peak of memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from fedkit.errors import FedkitError, UsageError
from fedkit.models.budget import check_budget, read_bytes
from fedkit.models.build import build_model
from fedkit.models.cost import cost, training_memory


def test_convolutions_and_linear_layers_are_counted_as_by_hand():
    # cnn at 28x28: 3x3 to 32 channels, pooled, 3x3 to 64, pooled, 128 hidden units.
    by_hand = 28 * 28 * 9 * 1 * 32 + 14 * 14 * 9 * 32 * 64 + 64 * 7 * 7 * 128 + 128 * 10
    found = cost("cnn", (1, 28, 28), 10)
    assert found.multiply_adds == by_hand
    assert found.parameters == (9 + 1) * 32 + (9 * 32 + 1) * 64 + (64 * 49 + 1) * 128 + 129 * 10
    assert found.bytes == 4 * found.parameters


def test_grouped_convolutions_are_counted_once_for_each_group():
    # The first block of MobileNetV2 at 8x8: a 3x3 stem of 32, a depthwise 3x3, 1x1 to 16.
    from fedkit.models.vision import mobilenet_v2

    with torch.device("meta"):
        model = mobilenet_v2((1, 8, 8), 10)
        first = sum(
            p.numel() for p in model.get_submodule("features.1").parameters() if p.dim() == 4
        )
    assert first == 9 * 32 + 32 * 16
    whole = cost("mobilenet_v2", (1, 8, 8), 10).multiply_adds
    weights = [(name, p.numel()) for name, p in model.named_parameters() if p.dim() in (2, 4)]
    # Strides halve behind blocks 3, 6 and 13; every weight of a convolution is used at each pixel.
    by_hand = 0
    for name, count in weights:
        block = int(name.split(".")[1])
        expands = name.endswith("conv.0.0.weight")
        side = 8 if block < 4 else 4 if block < 7 else 2 if block < 14 else 1
        if block in (4, 7, 14) and expands:
            side *= 2
        by_hand += count if name.startswith("classifier") else count * side * side
    assert whole == by_hand


def test_the_lstm_is_counted_at_every_step():
    by_hand = 80 * 4 * 256 * (8 + 256) + 80 * 4 * 256 * (256 + 256) + 256 * 80
    assert cost("lstm", (80,), 80, tokens=True).multiply_adds == by_hand


def test_attention_is_counted_with_its_scores():
    length, width, hidden = 80, 128, 512
    projections = 4 * length * width * width
    scores = 2 * length * length * width
    layer = projections + scores + 2 * length * width * hidden
    by_hand = 4 * layer + width * 80
    assert cost("transformer", (length,), 80, tokens=True).multiply_adds == by_hand


def test_torchvisions_attention_is_counted_too():
    # vit at 32x32: 64 patches of 4x4 and a class token, 6 layers of 192.
    tokens, width = 65, 192
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 768
    by_hand = 64 * 48 * width + 6 * layer + width * 10
    assert cost("vit", (3, 32, 32), 10).multiply_adds == by_hand


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "efficientnet_b0", "alexnet"])
def test_torchvisions_networks_cost_what_torchvision_publishes(name):
    from torchvision import models

    meta = models.get_model_weights(name).DEFAULT.meta
    found = cost(name, (3, 224, 224), 1000)
    assert found.parameters == meta["num_params"]
    # Published in units of 10^9 with three digits behind the point.
    assert found.multiply_adds / 1e9 == pytest.approx(meta["_ops"], abs=6e-4)


def test_heterofls_network_costs_what_the_paper_says():
    # The authors' 330.2 million have normalisation and activation in them, about 0.4%.
    found = cost("preresnet-1112", (3, 32, 32), 10)
    assert found.multiply_adds == pytest.approx(330.2e6, rel=0.005)
    assert found.multiply_adds < 330.2e6


def test_running_statistics_are_bytes_and_no_parameters():
    plain, batch = (cost(name, (1, 8, 8), 10) for name in ("lenet", "lenet:batch"))
    assert batch.parameters - plain.parameters == 2 * (6 + 16)
    # Means and variances, and a 64-bit counter for each of two layers.
    assert batch.bytes - plain.bytes == 4 * 4 * (6 + 16) + 2 * 8


def test_costs_of_data_that_a_network_cannot_read_are_told():
    with pytest.raises(UsageError, match="reads images"):
        cost("lenet", (80,), 80, tokens=True)
    with pytest.raises(UsageError, match="reads sequences of tokens"):
        cost("lstm", (60,), 10)
    with pytest.raises(UsageError, match="reads images or features"):
        cost("mlp", (80,), 80, tokens=True)


def real_peak(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> int:
    """Most bytes that torch's allocator had out in a training step with Adam, the second one."""
    optimiser = torch.optim.Adam(model.parameters())
    labels = torch.zeros(batch_size, dtype=torch.int64)

    def step() -> None:
        optimiser.zero_grad()
        images = torch.zeros(batch_size, *shape)
        functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    step()
    optimiser.zero_grad()
    held = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak


@pytest.mark.parametrize(("spec", "batch_size"), [("cnn", 64), ("preresnet18:0.25", 32)])
def test_training_memory_is_the_real_peak(spec, batch_size):
    shape = (3, 32, 32)
    model = build_model(spec, shape, 10, seed=1)
    real = real_peak(model, shape, batch_size)
    # Below: what oneDNN's convolutions want for themselves; above: nothing is counted that isn't there.
    assert 0.95 * real < training_memory(spec, shape, 10, batch_size) < 1.02 * real


def test_training_memory_of_a_model_is_that_of_its_name_and_leaves_it_alone():
    model = build_model("lenet:batch", (1, 8, 8), 10, seed=1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = training_memory(model, (1, 8, 8), 10, 16)
    assert found == training_memory("lenet:batch", (1, 8, 8), 10, 16)
    after = model.state_dict()
    assert not model.training and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_memory_grows_with_moments_by_the_weights_and_with_the_batch():
    weights = 4 * cost("lenet", (1, 8, 8), 10).parameters
    sgd, momentum, adam = (
        training_memory("lenet", (1, 8, 8), 10, 32, moments=moments) for moments in (0, 1, 2)
    )
    assert momentum - sgd == adam - momentum == weights
    small, large, larger = (
        training_memory("lenet", (1, 28, 28), 10, batch) for batch in (100, 200, 300)
    )
    assert large - small == larger - large > 0


def test_frozen_weights_need_neither_gradients_nor_moments():
    model = build_model("mlp:64", (60,), 10, seed=1)
    whole = training_memory(model, (60,), 10, 1)
    model.get_submodule("1").requires_grad_(False)
    frozen = 4 * (60 * 64 + 64)
    # Two moments and a gradient less; a row of activations more or less.
    saved = whole - training_memory(model, (60,), 10, 1)
    assert saved == pytest.approx(3 * frozen, abs=4 * 64)


def test_training_memory_counts_what_a_tied_network_holds_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(512, 512, bias=False)
            self.second = nn.Linear(512, 512, bias=False)
            self.second.weight = self.first.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(inputs))

    weights = 4 * 512 * 512
    # Weights, two moments, and two gradients until they are added.
    assert 5 * weights <= training_memory(Tied(), (512,), 512, 1) < 6.2 * weights


def test_a_network_that_must_see_numbers_cannot_be_measured():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs) if float(inputs.sum()) > 0 else self.linear(-inputs)

    with pytest.raises(FedkitError, match="Looks costs can't be told without running it"):
        training_memory(Looks(), (4,), 2, 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MB", 512_000_000),
        ("512mb", 512_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5G", 1_500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("64KiB", 65536),
        ("700", 700),
        ("12B", 12),
        ("1T", 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert read_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "MB", "-1GB", "1,5G", "2 GB RAM", "1e9", "0", "0.1B", "3iB", "nan"]
)
def test_what_is_no_size_is_told(text):
    with pytest.raises(UsageError, match="as in 512MB or 2GiB"):
        read_bytes(text)


def test_a_budget_that_is_too_small_is_told_with_both_figures():
    check_budget(1_000_000, 1_000_000)
    with pytest.raises(FedkitError, match=r"needs 1.3 GB .* the budget is 512 MB") as caught:
        check_budget(1_300_000_000, 512_000_000)
    assert caught.value.exit_code == 1
