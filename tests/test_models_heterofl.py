"""Widths and depths of HeteroFL's networks: a narrow one is a prefix of a wide one, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkit.models.build import build_model
from fedkit.models.transformer import _Attention

IMAGES, TEXT = (3, 32, 32), (20,)
SLICED = ["heterofl-cnn", "preresnet18", "preresnet-1112", "transformer"]
PUBLISHED_WIDTHS = (1, 0.5, 0.25, 0.125, 0.0625)
widths = st.floats(0.01, 1.0)


def tensors(spec: str, classes: int = 10) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shape = TEXT if spec.startswith("transformer") else IMAGES
        return build_model(spec, shape, classes, seed=1).state_dict()


def parameters(spec: str) -> int:
    with torch.device("meta"):
        model = build_model(spec, IMAGES, 10, seed=1)
    return sum(parameter.numel() for parameter in model.parameters())


def is_prefix(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    return narrow.dim() == wide.dim() and all(
        small <= large for small, large in zip(narrow.shape, wide.shape, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("preresnet-1112", [9_622_090, 2_408_746, 603_802, 151_762, 38_350]),
        ("preresnet18", [11_172_170, 2_796_714, 701_018, 176_178, 44_510]),
    ],
)
def test_parameters_are_those_of_heterofls_table_and_code(name, published):
    # Levels a to e on CIFAR-10, as the authors' code counts before and after its correction.
    assert [parameters(f"{name}:{width}") for width in PUBLISHED_WIDTHS] == published


def test_the_published_network_weighs_what_the_paper_says():
    assert parameters("preresnet-1112") * 4 / 2**20 == pytest.approx(36.705, abs=5e-4)


@pytest.mark.parametrize("name", SLICED)
@given(pair=st.tuples(widths, widths))
@settings(max_examples=5)
def test_every_tensor_of_a_narrow_network_is_a_prefix_of_the_wide_ones(name, pair):
    narrow, wide = (tensors(f"{name}:{width}") for width in sorted(pair))
    assert list(narrow) == list(wide)
    assert all(is_prefix(narrow[key], wide[key]) for key in narrow)


@pytest.mark.parametrize("name", SLICED)
@given(width=widths)
@settings(max_examples=5)
def test_hidden_layers_keep_the_ceiling_of_their_share_and_the_edges_all(name, width):
    whole, sliced = tensors(name), tensors(f"{name}:{width}")
    first = {"heterofl-cnn": "0.weight", "transformer": "embedding.weight"}.get(
        name, "conv1.weight"
    )
    last = [key for key in whole if key.endswith("weight")][-1]
    # Input channels, characters and positions; logits.
    inputs = 0 if name == "transformer" else 1
    assert sliced[first].shape[inputs] == whole[first].shape[inputs]
    assert sliced[last].shape[0] == whole[last].shape[0] == 10
    edges = {(first, inputs), (last, 0)} | {(last.replace("weight", "bias"), 0)}
    edges |= {("positions", 0)}
    if name == "transformer":
        # Heads are kept, and made thinner.
        edges |= {(key, 0) for key in whole if ".attention." in key}
    for key, tensor in whole.items():
        for place, size in enumerate(tensor.shape):
            kernel = place >= 2 and name != "transformer"
            kept = size if kernel or (key, place) in edges else math.ceil(width * size)
            assert sliced[key].shape[place] == kept, (key, place)


@pytest.mark.parametrize("name", ["preresnet18:0.25", "preresnet-1112:0.25"])
def test_a_shallow_network_is_a_prefix_of_a_deep_one(name):
    deep = tensors(name)
    for depth in (3, 2, 1):
        shallow = tensors(f"{name},depth={depth}")
        assert shallow.keys() < deep.keys()
        assert all(is_prefix(shallow[key], deep[key]) for key in shallow)
        blocks = [key for key in shallow if not key.startswith("head.")]
        assert all(shallow[key].shape == deep[key].shape for key in blocks)
        assert {key.split(".")[0] for key in blocks} == {"conv1"} | {
            f"layer{stage}" for stage in range(1, depth + 1)
        }
        deep = shallow


@pytest.mark.parametrize(
    ("name", "norm"),
    [("heterofl-cnn", "none"), ("preresnet18", "none"), ("preresnet-1112", "batch")],
)
def test_a_wide_network_whose_other_channels_are_zero_answers_as_the_narrow_one(name, norm):
    narrow = build_model(f"{name}:0.125,{norm}", IMAGES, 10, seed=1).double().eval()
    wide = build_model(f"{name}:0.25,{norm}", IMAGES, 10, seed=2).double().eval()
    small, large = narrow.state_dict(), wide.state_dict()
    for key, tensor in large.items():
        if "running" in key or "num_batches" in key:
            continue
        tensor.zero_()
        tensor[tuple(slice(size) for size in small[key].shape)] = small[key]
    images = torch.randn(
        2, *IMAGES, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(wide(images), narrow(images), rtol=1e-10, atol=1e-10)


def test_attention_is_sliced_inside_every_head():
    generator = torch.Generator().manual_seed(3)
    narrow, wide = _Attention(16, 4).double(), _Attention(32, 8).double()
    with torch.no_grad():
        for key, tensor in wide.named_parameters():
            small = narrow.get_parameter(key)
            small.normal_(generator=generator)
            tensor.zero_()
            tensor[tuple(slice(size) for size in small.shape)] = small
        # Scores are divided by the square root of a head's width, which is twice as large.
        wide.query.mul_(math.sqrt(2))
        states = torch.randn(2, 5, 32, dtype=torch.float64, generator=generator)
        states[..., 16:] = 0
        answer = wide(states)
        torch.testing.assert_close(answer[..., :16], narrow(states[..., :16]))
        assert (answer[..., 16:] == 0).all()


def test_the_transformers_attention_is_torchs_own():
    generator = torch.Generator().manual_seed(3)
    ours = _Attention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4, bias=False, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(generator=generator)
        stacked = [part.reshape(16, 16) for part in (ours.query, ours.key, ours.value)]
        theirs.in_proj_weight.copy_(torch.cat(stacked))
        theirs.out_proj.weight.copy_(ours.output.reshape(16, 16).T)
        states = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(ours(states), theirs(states, states, states)[0])
