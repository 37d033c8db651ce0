"""Slices of networks: the right channels, of every network that can be sliced; a sentence for others."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from fedkit.errors import UsageError
from fedkit.knowledge.held import open_mesh, positions
from fedkit.models.build import build_model
from fedkit.models.slicing import Slicing
from fedkit.models.vit import SliceableVisionTransformer

IMAGES, TOKENS, CLASSES = (3, 8, 8), (6,), 7
LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0625)
TEXT = ("lstm:24", "transformer")
SMALL = ("lenet", "lenet:batch", "cnn", "cnn1:wide", "cnn2", "mlp:30,20", "heterofl-cnn", "lstm:24")
# Built by name at a width: somebody else's way to the same shapes.
BY_NAME = (
    "heterofl-cnn",
    "heterofl-cnn:group",
    "preresnet18",
    "preresnet-1112:none",
    "transformer",
)
LARGE = (
    "alexnet",
    "vit",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet",
    "exits:preresnet18",
)


SLOW = pytest.mark.slow


def shape_of(spec: str) -> tuple[int, ...]:
    return TOKENS if spec in TEXT else IMAGES


@cache
def slicing_of(spec: str) -> Slicing:
    return Slicing(spec, shape_of(spec), CLASSES)


def wide(spec: str, seed: int = 1) -> nn.Module:
    """With weights and statistics that are all different, in float64."""
    model = build_model(spec, shape_of(spec), CLASSES, seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor += torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def batch(spec: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if spec in TEXT:
        return torch.randint(CLASSES, (2, *TOKENS), generator=generator)
    return torch.randn(2, *IMAGES, generator=generator, dtype=torch.float64)


class OnKept(nn.Module):
    """A normalisation over channels, done on those that are kept; the others are zero."""

    def __init__(self, norm: nn.Module, kept: np.ndarray, axis: int) -> None:
        super().__init__()
        self.norm, self.kept, self.axis = norm, torch.from_numpy(kept), axis

    def forward(self, states: Tensor) -> Tensor:
        return torch.zeros_like(states).index_copy(
            self.axis, self.kept, self.norm(states.index_select(self.axis, self.kept))
        )


def masked(spec: str, slicing: Slicing, narrow: nn.Module, width: float) -> nn.Module:
    """The wide network with zeros wherever the narrow one has nothing."""
    model, indices = wide(spec), slicing.indices(width)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point() or "running" in name:
                continue
            place = open_mesh(indices[name], tuple(tensor.shape))
            kept = tensor[place].clone()
            tensor.zero_()
            tensor[place] = kept
    for name, module in list(model.named_modules()):
        axis = {nn.LayerNorm: -1, nn.GroupNorm: 1}.get(type(module))
        if axis is None:
            continue
        (rows,) = indices[f"{name}.weight"]
        parent, _, own = name.rpartition(".")
        kept = positions(rows, module.weight.shape[0])
        on_kept = OnKept(narrow.get_submodule(name), kept, axis)
        setattr(model.get_submodule(parent), own, on_kept)
    # Attention divides scores by the root of its heads' width.
    for name, tensor in state.items():
        if name.endswith("query"):
            tensor *= math.sqrt(tensor.shape[1] / narrow.state_dict()[name].shape[1])
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            third = len(tensor) // 3
            tensor[:third] *= math.sqrt(third / (len(narrow.state_dict()[name]) // 3))
    return model


@pytest.mark.parametrize("width", [0.5, 0.125])
@pytest.mark.parametrize("spec", [*SMALL, *BY_NAME, *(pytest.param(s, marks=SLOW) for s in LARGE)])
def test_a_narrow_network_answers_as_the_wide_one_without_the_other_channels(spec, width):
    slicing = slicing_of(spec)
    arrays = arrays_of(wide(spec))
    weights = {n: torch.from_numpy(a) for n, a in slicing.take(arrays, width).items()}
    narrow = slicing.network(width).double().to_empty(device="cpu")
    narrow.load_state_dict(weights)
    inputs = batch(spec)
    with torch.inference_mode():
        logits = narrow.eval()(inputs)
        wanted = masked(spec, slicing, narrow, width)(inputs)
    assert logits.std() > 1e-6
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", LEVELS)
@pytest.mark.parametrize("spec", BY_NAME)
def test_shapes_are_those_of_the_network_built_by_name_at_that_width(spec, width):
    name, _, norm = spec.partition(":")
    with torch.device("meta"):
        by_name = build_model(
            f"{name}:{width}{',' + norm if norm else ''}", shape_of(spec), CLASSES, seed=1
        )
    try:
        found = slicing_of(spec).network(width).state_dict()
    except UsageError as error:
        pytest.fail(str(error))
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in by_name.state_dict().items()
    }


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        # The authors' table (algorithms.md 7), for CIFAR-10.
        ("preresnet-1112", (9_622_090, None, None, None, 38_350)),
        ("preresnet18", (11_172_170, 2_796_714, 701_018, 176_178, 44_510)),
    ],
)
def test_slices_have_the_papers_numbers_of_parameters(spec, counts):
    slicing = Slicing(spec, (3, 32, 32), 10)
    for width, count in zip(LEVELS, counts, strict=True):
        found = sum(parameter.numel() for parameter in slicing.network(width).parameters())
        assert count is None or found == count


@pytest.mark.parametrize("width", LEVELS)
def test_a_slice_has_as_many_numbers_as_arithmetic_says(width):
    a, b, c, d = (math.ceil(width * size) for size in (6, 16, 120, 84))
    grid = 2 * 2
    counted = (
        (3 * 25 + 1) * a + (a * 25 + 1) * b + (b * grid + 1) * c + (c + 1) * d + (d + 1) * CLASSES
    )
    taken = slicing_of("lenet").take(arrays_of(build_model("lenet", IMAGES, CLASSES, 1)), width)
    assert sum(array.size for array in taken.values()) == counted
    assert sum(array.nbytes for array in taken.values()) == 4 * counted


@pytest.mark.parametrize("spec", ["lenet:batch", "lstm:24", "transformer"])
def test_a_slice_put_back_where_it_came_from_changes_nothing(spec):
    slicing = slicing_of(spec)
    arrays = {name: array.copy() for name, array in arrays_of(wide(spec)).items()}
    before = {name: array.copy() for name, array in arrays.items()}
    taken = slicing.take(arrays, 0.25)
    for name, kept in slicing.indices(0.25).items():
        place = open_mesh(kept, arrays[name].shape)
        assert taken[name].flags.c_contiguous
        assert taken[name].shape == np.asarray(arrays[name][place]).shape
        arrays[name][place] = taken[name]
    for name, array in before.items():
        assert array.tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    "spec", ["heterofl-cnn", pytest.param("shufflenet", marks=SLOW), "lstm:24"]
)
def test_narrower_index_sets_lie_in_wider_ones(spec):
    slicing = slicing_of(spec)
    sizes = {n: t.shape for n, t in slicing.network(1.0).state_dict().items()}
    for wider, narrower in pairwise(LEVELS):
        for name, rows in slicing.indices(narrower).items():
            outer = slicing.indices(wider)[name]
            for inner, around, size in zip(rows, outer, sizes[name], strict=True):
                within = positions(inner, size)
                assert len(set(within.tolist())) == len(within)
                assert set(within.tolist()) <= set(positions(around, size).tolist())


def test_ordinary_networks_keep_prefixes():
    for spec in ("lenet:batch", "preresnet18", "transformer"):
        for rows in slicing_of(spec).indices(0.25).values():
            assert all(isinstance(row, slice) and row.start == 0 for row in rows)


def test_the_whole_width_keeps_everything_and_one_pixel_column_for_each_kept_channel():
    slicing = slicing_of("lenet")
    for name, tensor in slicing.network(1.0).state_dict().items():
        assert [row.stop for row in slicing.indices(1.0)[name]] == list(tensor.shape)
    # 16 channels of 2x2 pixels; 4 channels stay, with all of their pixels.
    assert slicing.indices(0.25)["7.weight"][1] == slice(0, 4 * 2 * 2)


def test_of_logistic_regression_nothing_is_hidden():
    slicing = slicing_of("logistic")
    assert slicing.logits == {"1.weight": 0, "1.bias": 0}
    whole = slicing.indices(1.0)
    assert slicing.indices(0.0625) == whole


@pytest.mark.parametrize(
    ("spec", "logits"),
    [
        ("cnn", {"9.weight", "9.bias"}),
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("exits:cnn", {f"exits.{n}.linear.{t}" for n in (1, 2, 3) for t in ("weight", "bias")}),
    ],
)
def test_the_output_layer_is_known(spec, logits):
    slicing = slicing_of(spec)
    assert slicing.logits == dict.fromkeys(logits, 0)
    for name in logits:
        assert slicing.indices(0.25)[name][0] == slice(0, CLASSES)


def test_the_scaler_divides_hidden_outputs_while_it_trains_and_does_nothing_else():
    slicing = slicing_of("cnn")
    arrays = slicing.take(arrays_of(build_model("cnn", IMAGES, CLASSES, 1)), 0.25)
    model = slicing.network(0.25, {n: torch.from_numpy(a) for n, a in arrays.items()})
    inputs = batch("cnn").float()
    plain = model(inputs)
    with slicing.scaled(model, 0.25):
        model.eval()
        assert torch.equal(model(inputs), plain)
        model.train()
        # The first hidden layer's output and, by way of it, all that follow: ReLU and pooling scale along.
        first, others = model[0](inputs), model[1:]
        with torch.no_grad():
            wanted = inputs
            for layer in model:
                hidden = isinstance(layer, nn.Conv2d | nn.Linear) and layer is not model[-1]
                wanted = type(layer).forward(layer, wanted) / (0.25 if hidden else 1)
        assert torch.equal(first, type(model[0]).forward(model[0], inputs) / 0.25)
        torch.testing.assert_close(others(first), wanted)
    assert torch.equal(model(inputs), plain)
    with slicing.scaled(model, 1.0):
        assert not any(layer._forward_hooks for layer in model.modules())


def test_attention_is_scaled_too():
    slicing = slicing_of("transformer")
    arrays = slicing.take(arrays_of(build_model("transformer", TOKENS, CLASSES, 1)), 0.25)
    model = slicing.network(0.25, {n: torch.from_numpy(a) for n, a in arrays.items()})
    tokens = batch("transformer")
    with slicing.scaled(model, 0.25):
        hooked = [name for name, layer in model.named_modules() if layer._forward_hooks]
    assert "layers.0.attention.projected" in hooked and "layers.3.linear2" in hooked
    assert "head" not in hooked and "embedding" not in hooked
    assert model(tokens).shape == (2, CLASSES)


def test_torchs_own_attention_is_scaled_by_what_it_gives(own_code):
    model, inputs = Attending().train(), torch.randn(2, 5, 32)
    plain, weights = model.attention(inputs, inputs, inputs)
    with slicing_of(own_code(Attending)).scaled(model, 0.5):
        scaled, same = model.attention(inputs, inputs, inputs)
    assert torch.equal(scaled, plain / 0.5) and torch.equal(same, weights)


class Grouped(nn.Module):
    """Convolutions in groups, transposed, a concatenation with the input, and a gate."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=groups)
        self.back = nn.ConvTranspose2d(32, 16, 3, padding=1)
        self.gate = nn.Linear(16, 16)
        self.slope = nn.PReLU(16)
        self.last = nn.Linear(19, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.back(self.grouped(torch.relu(self.first(images))))
        pooled = features.mean(dim=(2, 3))
        gated = self.slope(features * torch.sigmoid(self.gate(pooled))[:, :, None, None])
        both = torch.cat([images, gated], dim=1)
        return self.last(both.amax(dim=(2, 3)))


class Tied(nn.Module):
    """A branch that is added to the picture itself: it can't be narrower than that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 1)
        self.outer = nn.Conv2d(8, 3, 1)
        self.last = nn.Linear(3 * 64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        added = images + self.outer(torch.relu(self.inner(images)))
        return self.last(added.flatten(1))


class Attending(nn.Module):
    """torch's own attention, whose heads lie behind each other in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.last = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        states = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        seen, _ = self.attention(states, states, states, need_weights=False)
        return self.last((states + seen)[:, 0])


class Counting(nn.Module):
    """Writes its width into a view, as torchvision's own vision transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).reshape(len(images), 8, 64).mean(dim=2))


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.cumsum(self.first(images), dim=1).mean(dim=(2, 3)))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last((self.first(images) * self.scale).mean(dim=(2, 3)))


class Declared(Bare):
    sliced = {"scale": (0,)}  # noqa: RUF012


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    from fedkit import registry

    def allow(kind: type[nn.Module]) -> str:
        name = f"{__name__}:{kind.__name__.lower()}"
        monkeypatch.setattr(registry, "_allowed", {name})
        return name

    return allow


def grouped(shape, classes):
    return Grouped()


def tied(shape, classes):
    return Tied()


def attending(shape, classes):
    return Attending()


def counting(shape, classes):
    return Counting()


def scattered(shape, classes):
    return Scattered()


def bare(shape, classes):
    return Bare()


def declared(shape, classes):
    return Declared()


@pytest.mark.parametrize("kind", [Grouped, Tied, Attending, Declared])
def test_somebodys_own_network_is_followed_too(kind, own_code):
    spec = own_code(kind)
    test_a_narrow_network_answers_as_the_wide_one_without_the_other_channels(spec, 0.5)


def test_groups_keep_their_channels_and_the_picture_keeps_its_own(own_code):
    rows = slicing_of(own_code(Grouped)).indices(0.5)
    # Two of four channels in each of four groups.
    assert rows["first.weight"][0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert rows["grouped.weight"][1] == slice(0, 2)
    assert rows["last.weight"][1] == slice(0, 3 + 8)
    assert slicing_of(own_code(Tied)).indices(0.25)["outer.weight"] == (
        slice(0, 3),
        slice(0, 2),
        slice(0, 1),
        slice(0, 1),
    )


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Scattered, r"can't be followed through cumsum.default in the network itself"),
        (Bare, r"can't be sliced to 0.5: the network itself \(Bare\) fails"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(kind, sentence, own_code):
    with pytest.raises(UsageError, match=sentence):
        slicing_of(own_code(kind)).indices(0.5)


def test_a_network_that_counts_on_its_own_width_is_refused(own_code):
    with pytest.raises(UsageError, match=r"the network itself \(Counting\) fails"):
        slicing_of(own_code(Counting)).indices(0.5)


def test_the_sliceable_vision_transformer_is_torchvisions_to_the_bit():
    sizes = {"image_size": 8, "patch_size": 2, "num_layers": 2, "num_heads": 3}
    sizes |= {"hidden_dim": 24, "mlp_dim": 96, "num_classes": CLASSES}
    models = []
    for kind in (VisionTransformer, SliceableVisionTransformer):
        torch.manual_seed(1)
        models.append(kind(**sizes))
    images = batch("vit").float()
    plain, ours = (model.eval()(images) for model in models)
    assert torch.equal(plain, ours)
    assert list(models[0].state_dict()) == list(models[1].state_dict())


def test_heads_stay_and_are_sliced_inside(own_code):
    rows = slicing_of(own_code(Attending)).indices(0.25)["attention.in_proj_weight"][0]
    # Query, key and value of two heads of 16 each: the first four of every one.
    assert rows.tolist() == [16 * head + at for head in range(6) for at in range(4)]


def test_groups_that_do_not_divide_are_refused_by_name(own_code):
    with pytest.raises(
        UsageError, match=r"its layer 1 \(GroupNorm\) has 3 channels, which 2 groups"
    ):
        slicing_of("lenet:group").indices(0.5)
    assert slicing_of("lenet:group").indices(0.25)["1.weight"] == (slice(0, 2),)
    with pytest.raises(UsageError, match=r"its layer grouped \(Conv2d\) has 2 channels in"):
        slicing_of(own_code(Grouped)).indices(0.125)


@pytest.mark.parametrize("width", [0.0, -1.0, 1.5, math.nan])
def test_a_width_is_a_share(width):
    with pytest.raises(UsageError, match="A width is above 0 and up to 1"):
        slicing_of("cnn").indices(width)
