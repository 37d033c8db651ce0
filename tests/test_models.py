"""Networks by name: what they read, what they answer, how large they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkit.errors import UsageError
from fedkit.models.build import build_model
from fedkit.registry import load, names

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
# torchvision's names for what shufflenet:W builds, held against it below.
ALIASES = {
    f"shufflenet_v2_x{width.replace('.', '_')}": width for width in ("0.5", "1.0", "1.5", "2.0")
}
MOBILE = ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]
LARGE = ["alexnet", "resnet34", "resnet50"]
TEXT = ["lstm:32", "transformer:0.25"]
ON_IMAGES = [
    *(
        set(names("models"))
        - {"exits", "lstm", "transformer", "preresnet18", "preresnet-1112"}
        - set(ALIASES)
    ),
    "lenet:batch",
    "lenet:group",
    "cnn1:wide",
    "cnn2:wide",
    "shufflenet:0.5",
    "mlp:7",
    "heterofl-cnn:0.25,group",
    "heterofl-cnn:0.3,none",
    "preresnet18:0.5",
    "preresnet18:0.25,group",
    "preresnet-1112:0.5",
    "preresnet18:0.0625,none,depth=1",
    "preresnet-1112:0.125,depth=3",
]


def on_meta(spec: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(spec, shape, classes, seed=1)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def answers_and_learns(model: nn.Module, inputs: torch.Tensor, classes: int) -> None:
    with torch.no_grad():
        answer = model.eval()(inputs)
    assert answer.shape == (2, classes) and answer.isfinite().all()
    logits = model.train()(inputs)
    assert logits.shape == (2, classes) and logits.isfinite().all()
    functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def trials() -> list[tuple[str, tuple[int, ...]]]:
    # The largest cost seconds each: the ends for them, and what lies between without numbers, below.
    return [
        (spec, shape)
        for spec in sorted(ON_IMAGES)
        for shape in ((IMAGES[0], IMAGES[-1]) if spec in LARGE else IMAGES)
    ]


@pytest.mark.parametrize(("spec", "shape"), trials())
def test_every_network_reads_small_images_and_every_parameter_learns(spec, shape):
    generator = torch.Generator().manual_seed(3)
    model = build_model(spec, shape, 7, seed=1)
    answers_and_learns(model, torch.randn(2, *shape, generator=generator), 7)


@pytest.mark.parametrize("spec", LARGE)
@pytest.mark.parametrize("shape", IMAGES[1:-1], ids=str)
def test_the_largest_networks_read_what_lies_between(spec, shape):
    model = on_meta(spec, shape, 7)
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("spec", TEXT)
@pytest.mark.parametrize("length", [1, 20])
def test_every_network_for_text_reads_tokens_and_every_parameter_learns(spec, length):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(65, (2, length), generator=generator)
    answers_and_learns(build_model(spec, (length,), 65, seed=1), tokens, 65)


@pytest.mark.parametrize("spec", ["logistic", "mlp:20,10"])
def test_tabular_networks_read_features(spec):
    features = torch.randn(2, 60, generator=torch.Generator().manual_seed(3))
    answers_and_learns(build_model(spec, (60,), 10, seed=1), features, 10)


@pytest.mark.parametrize("spec", ["vit", "alexnet", "resnet18", "cnn1"])
def test_images_need_not_be_square(spec):
    images = torch.randn(2, 3, 19, 30, generator=torch.Generator().manual_seed(3))
    model = build_model(spec, (3, 19, 30), 5, seed=1)
    assert model.eval()(images).shape == (2, 5)


def test_the_padded_edge_of_a_vit_holds_zeros_and_no_pixel_is_lost():
    model = build_model("vit", (1, 10, 11), 5, seed=1).eval()
    nn.init.normal_(model.get_submodule("1.heads.head").weight)
    images = torch.randn(1, 1, 10, 11, requires_grad=True)
    model(images).sum().backward()
    assert images.grad is not None and (images.grad != 0).all()
    padded = functional.pad(images, (0, 1, 0, 2))
    torch.testing.assert_close(model.get_submodule("1")(padded), model(images))


@pytest.mark.parametrize("name", sorted(set(names("models")) - {"logistic", "mlp", *ALIASES}))
def test_a_shape_that_a_network_cannot_read_is_told(name):
    wrong = (3, 32, 32) if name in ("lstm", "transformer") else (80,)
    with pytest.raises(UsageError, match=r" reads (images|sequences).*; these data are "):
        on_meta(name, wrong, 10)


@pytest.mark.parametrize("spec", ["lstm:8", "transformer:0.1"])
def test_networks_for_text_refuse_features(spec):
    with pytest.raises(UsageError, match="reads sequences of tokens; these data are 60 features"):
        build_model(spec, (60,), 10, seed=1)(torch.randn(2, 60))


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_networks_for_numbers_refuse_tokens(name):
    with pytest.raises(UsageError, match="reads images or features; these data are sequences"):
        build_model(name, (60,), 10, seed=1)(torch.zeros(2, 60, dtype=torch.int64))


@pytest.mark.parametrize(
    "spec",
    [
        "lenet:what",
        "cnn:2",
        "cnn1:narrow",
        "resnet34:x",
        "vit:pretrained",
        "shufflenet:7",
        "shufflenet:0.5,0.5",
        "shufflenet:0.5,what",
        "mlp:",
        "mlp:0",
        "mlp:-3",
        "mlp:1e3",
        "mlp:999999999999",
        "logistic:2",
        "heterofl-cnn:0",
        "heterofl-cnn:1.5",
        "heterofl-cnn:nan",
        "heterofl-cnn:0.5,layer",
        "heterofl-cnn:0.33,group",
        "heterofl-cnn:0.5,0.25",
        "heterofl-cnn:",
        "preresnet18:0.5,batch,group",
        "preresnet18:depth=1,depth=2",
        "heterofl-cnn:0.5,depth=1",
        "preresnet18:width=x",
        "preresnet18:0.5,depth=5",
        "preresnet-1112:0.5,depth=0",
    ],
)
def test_bad_arguments_are_told_in_a_sentence(spec):
    name = spec.partition(":")[0]
    with pytest.raises(UsageError) as caught:
        on_meta(spec, (1, 8, 8), 10)
    assert name in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("spec", ["lstm:8,8", "lstm:x", "transformer:0", "transformer:0.5,group"])
def test_bad_arguments_of_networks_for_text_are_told(spec):
    with pytest.raises(UsageError, match=spec.partition(":")[0]):
        on_meta(spec, (80,), 80)


@pytest.mark.parametrize("name", ["cnn1", "heterofl-cnn", "lenet"])
def test_images_that_pooling_would_use_up_are_refused(name):
    with pytest.raises(UsageError, match="images of at least"):
        on_meta(name, (1, 2, 2), 10)


@pytest.mark.parametrize(
    "name",
    ["alexnet", "efficientnet_b0", "resnet18", "resnet34", "resnet50", *MOBILE, *ALIASES],
)
def test_large_images_are_read_in_torchvisions_original_form(name):
    from torchvision import models

    with torch.device("meta"):
        original = getattr(models, name)(num_classes=1000)
    ours = on_meta(name, (3, 224, 224), 1000)
    assert str(ours) == str(original)
    published = models.get_model_weights(name).DEFAULT.meta["num_params"]
    assert parameters(ours) == published


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "efficientnet_b0", "shufflenet:0.5"])
@pytest.mark.parametrize("side", [32, 64])
def test_small_images_shrink_eightfold_instead_of_thirtytwofold(name, side):
    model = on_meta(name, (3, side, side), 10).eval()
    grids: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: grids.append(output.shape[-1]))
    model(torch.empty(1, 3, side, side, device="meta"))
    # Squeeze-and-excitation looks at one pixel, the mean of all.
    assert min(grid for grid in grids if grid > 1) == side // 8
    assert grids[0] == side


@pytest.mark.parametrize("alias", ALIASES)
def test_torchvisions_names_of_shufflenet_build_the_same_weights(alias):
    ours = build_model(f"shufflenet:{ALIASES[alias]}", (3, 32, 32), 10, seed=1).state_dict()
    named = build_model(alias, (3, 32, 32), 10, seed=1).state_dict()
    assert ours.keys() == named.keys()
    assert all(torch.equal(ours[key], named[key]) for key in ours)


def test_the_2nn_of_fedavg_has_the_published_number_of_parameters():
    # McMahan et al. 2017, section 3.
    assert parameters(on_meta("mlp:200,200", (1, 28, 28), 10)) == 199_210
    assert parameters(on_meta("mlp", (1, 28, 28), 10)) == 199_210


def test_logistic_regression_has_a_weight_for_every_feature_and_class():
    assert parameters(on_meta("logistic", (60,), 10)) == 60 * 10 + 10
    assert parameters(on_meta("logistic", (1, 28, 28), 10)) == 784 * 10 + 10


def test_the_lstm_of_leaf_has_the_published_layers():
    # LEAF's cells have one bias of 4 x 256 a layer; torch's have two.
    embedding, head = 80 * 8, 256 * 80 + 80
    leaf = embedding + 4 * 256 * (8 + 256 + 1) + 4 * 256 * (256 + 256 + 1) + head
    assert parameters(on_meta("lstm", (80,), 80)) == leaf + 2 * 4 * 256 == 819_920


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("cnn1", [(1024, 64), (64, 10)]),
        ("cnn1:wide", [(1024, 1024), (1024, 64), (64, 10)]),
        ("cnn2", [(2048, 10)]),
        ("cnn2:wide", [(2048, 2048), (2048, 10)]),
    ],
)
def test_feddistills_students_flatten_to_the_papers_sizes_at_32x32(spec, layers):
    model = on_meta(spec, (3, 32, 32), 10)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == layers


@pytest.mark.parametrize(("side", "padding"), [(17, (1, 1)), (18, (0, 0))])
def test_feddistills_students_are_padded_only_where_nothing_would_be_left(side, padding):
    model = on_meta("cnn1", (1, side, side), 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [one.padding for one in convolutions] == [padding] * 3
    assert model(torch.empty(1, 1, side, side, device="meta")).shape == (1, 10)


def test_lenets_normalisation_follows_each_convolution():
    for kind, layer in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        modules = list(on_meta(f"lenet:{kind}", (1, 28, 28), 10))
        after = [modules[at + 1] for at, one in enumerate(modules) if isinstance(one, nn.Conv2d)]
        assert len(after) == 2 and all(isinstance(one, layer) for one in after)


@pytest.mark.parametrize("name", names("models"))
def test_every_network_is_documented(name):
    about = (load("models", name).__doc__ or "").strip().splitlines()
    assert about and about[0].rstrip().endswith(".")
    if name not in ("lstm", "transformer", "mlp", "logistic"):
        assert any(line.strip().startswith("Small images: ") for line in about)
