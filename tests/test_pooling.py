"""Pooling that compares quarters of images: torch's own numbers, forwards and backwards."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap

from fedkit.models import pooling
from fedkit.models.build import build_model
from fedkit.models.pooling import HalvingMaxPool2d

POOL, PLAIN = HalvingMaxPool2d(), nn.MaxPool2d(2)


def plain(model):
    """The same network as anybody would write it."""
    other = copy.deepcopy(model)
    for at, module in enumerate(other):
        if isinstance(module, HalvingMaxPool2d):
            other[at] = nn.MaxPool2d(2)
    return other


def both(images, weights):
    """Outputs and gradients: of ours, and of torch's."""
    for pool in (POOL, PLAIN):
        leaf = images.clone().requires_grad_()
        out = pool(leaf)
        (out * weights).sum().backward()
        yield out.detach(), leaf.grad


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9)),
    values=st.sampled_from(["real", "few", "none negative", "infinite"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_outputs_and_gradients_are_torchs(shape, values, dtype, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "LEAST", 1)
        rng = torch.Generator().manual_seed(seed)
        images = torch.randn(shape, generator=rng, dtype=dtype)
        if values == "few":  # so that several of a square are the largest
            images = images.round()
        elif values == "none negative":
            images = images.relu()
        elif values == "infinite":
            images[images.abs() > 1] *= torch.inf
        weights = torch.randn(shape[0], shape[1], shape[2] // 2, shape[3] // 2, dtype=dtype)
        assert pooling._pays(images)
        ours, theirs = both(images, weights)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        with torch.inference_mode():
            assert torch.equal(POOL(images), theirs[0])


def test_what_is_not_a_number_is_told_where_torch_tells_it(monkeypatch):
    monkeypatch.setattr(pooling, "LEAST", 1)
    images = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    images[torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = torch.nan
    ours, theirs = both(images, torch.ones(2, 2, 4, 4))
    assert theirs[0].isnan().any() and not theirs[0].isnan().all()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert torch.equal(ours[0].nan_to_num(7), theirs[0].nan_to_num(7))


@pytest.mark.parametrize("name", ["lenet", "lenet:batch", "cnn", "cnn1", "heterofl-cnn:0.25"])
def test_a_network_trains_to_the_same_weights(name):
    model = build_model(name, (1, 28, 28), 10, seed=3)
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((32, 1, 28, 28))).float()
    labels = torch.arange(32) % 10
    assert any(isinstance(module, HalvingMaxPool2d) for module in model)
    weights = []
    for network in (model, plain(model)):
        optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
        weights.append(network.state_dict())
    for tensor, other in zip(*(state.values() for state in weights), strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("where", [0, 1])
def test_within_vmap_it_is_torchs(where, monkeypatch):
    monkeypatch.setattr(pooling, "LEAST", 1)
    images = torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).round()
    images = images.movedim(0, where).contiguous().requires_grad_()
    found = vmap(POOL, in_dims=where)(images)
    (together,) = torch.autograd.grad((found**2).sum(), images)
    wanted = torch.stack([PLAIN(one) for one in images.unbind(where)])
    (apart,) = torch.autograd.grad((wanted**2).sum(), images)
    assert torch.equal(found, wanted)
    assert torch.equal(together, apart)


def test_stacked_networks_compute_what_each_does():
    models = [build_model("lenet", (1, 28, 28), 10, seed=seed) for seed in (1, 2)]
    stacked = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        for name, _ in models[0].named_parameters()
    }
    images = torch.randn(2, 16, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    found = vmap(lambda state, some: functional_call(models[0], state, some))(stacked, images)
    wanted = torch.stack([plain(m)(some) for m, some in zip(models, images, strict=True)])
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.randn(8, 4, 32, 32).to(memory_format=torch.channels_last),
        torch.randn(8, 4, 32, 32).half(),
        torch.randn(8, 4, 32, 32, device="meta"),
        torch.randn(4, 64, 64),
        torch.randn(1, 1, 8, 8),
    ],
    ids=["by channels", "half", "no numbers", "one image", "small"],
)
def test_what_it_is_not_made_for_is_torchs(images):
    assert not pooling._pays(images)
    out = POOL(images)
    assert out.shape == PLAIN(images).shape
    assert out.is_meta or torch.equal(out, PLAIN(images))


def test_an_exported_network_holds_torchs_own_pooling():
    model = build_model("cnn", (1, 28, 28), 10, seed=1).eval()
    images = torch.randn(32, 1, 28, 28)
    exported = torch.export.export(model, (images,))
    assert "max_pool2d" in exported.graph_module.code
    assert torch.allclose(exported.module()(images), model(images), atol=1e-6)
