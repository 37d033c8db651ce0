"""torchvision's published weights in networks for other images: what is kept, and where files are found.

No weights are downloaded here: a small file of the published name and the published shapes stands for
them.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from fedkit.errors import FedkitError, UsageError
from fedkit.models.build import build_model
from fedkit.models.pretrained import from_scratch

# torchvision's file names carry the first eight digits of their SHA-256.
RESNET18, MOBILENET = "resnet18-f37072fd.pth", "mobilenet_v2-7ebf99e0.pth"
# Which tensors are not pre-trained in networks for CIFAR-10, as docs/models.md has it.
DRAWN = {
    "resnet18": {"conv1.weight", "fc.weight", "fc.bias"},
    "resnet34": {"conv1.weight", "fc.weight", "fc.bias"},
    "resnet50": {"conv1.weight", "fc.weight", "fc.bias"},
    "shufflenet_v2_x0_5": {"fc.weight", "fc.bias"},
    "shufflenet_v2_x1_0": {"fc.weight", "fc.bias"},
    "shufflenet_v2_x1_5": {"fc.weight", "fc.bias"},
    "shufflenet_v2_x2_0": {"fc.weight", "fc.bias"},
    "mobilenet_v2": {"classifier.1.weight", "classifier.1.bias"},
    "mobilenet_v3_small": {"classifier.3.weight", "classifier.3.bias"},
    "mobilenet_v3_large": {"classifier.3.weight", "classifier.3.bias"},
    "efficientnet_b0": {"classifier.1.weight", "classifier.1.bias"},
    "alexnet": {
        "features.0.weight",
        "classifier.1.weight",
        "classifier.6.weight",
        "classifier.6.bias",
    },
}


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """The folder where torch.hub looks for weights; nothing can be downloaded into it."""

    def offline(url: str, *arguments: object, **named: object) -> None:
        raise URLError("no way out")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published() -> dict[str, torch.Tensor]:
    """Some tensors of ResNet-18 as published, with numbers that nobody would draw."""
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "fc.weight": (1000, 512),
        "fc.bias": (1000,),
    }
    return {name: torch.full(shape, 7.0) for name, shape in shapes.items()}


def test_what_fits_is_kept_and_the_rest_is_drawn_from_the_seed(checkpoints):
    torch.save(published(), checkpoints / RESNET18)
    drawn = build_model("resnet18", (3, 32, 32), 10, seed=1, client=2).state_dict()
    found = build_model("resnet18:pretrained", (3, 32, 32), 10, seed=1, client=2).state_dict()
    assert found.keys() == drawn.keys()
    kept = {name for name in found if not torch.equal(found[name], drawn[name])}
    assert kept == {"bn1.running_mean", "layer1.0.conv1.weight"}
    assert all((found[name] == 7).all() for name in kept)


def test_the_original_form_keeps_stem_and_head(checkpoints):
    torch.save(published(), checkpoints / RESNET18)
    found = build_model("resnet18:pretrained", (3, 96, 96), 1000, seed=1).state_dict()
    assert all((found[name] == 7).all() for name in published())


def test_a_stem_for_one_channel_is_drawn(checkpoints):
    weights = {
        "features.0.0.weight": torch.full((32, 3, 3, 3), 7.0),
        "features.1.conv.1.weight": torch.full((16, 32, 1, 1), 7.0),
    }
    torch.save(weights, checkpoints / MOBILENET)
    grey = build_model("mobilenet_v2:pretrained", (1, 28, 28), 10, seed=1).state_dict()
    colour = build_model("mobilenet_v2:pretrained", (3, 32, 32), 10, seed=1).state_dict()
    assert not (grey["features.0.0.weight"] == 7).any()
    assert (grey["features.1.conv.1.weight"] == 7).all()
    assert (colour["features.0.0.weight"] == 7).all()


@pytest.mark.parametrize("name", DRAWN)
def test_tensors_without_pretrained_weights_are_those_in_the_manual(name):
    from torchvision import models

    with torch.device("meta"):
        ours = build_model(name, (3, 32, 32), 10, seed=1).state_dict()
        theirs = getattr(models, name)(num_classes=1000).state_dict()
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key].shape != theirs[key].shape} == DRAWN[name]
    manual = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for layer in {key.rpartition(".")[0] for key in DRAWN[name]}:
        assert f"`{layer}`" in manual


@pytest.mark.parametrize("name", DRAWN)
def test_without_numbers_no_weights_are_wanted(checkpoints, name):
    with torch.device("meta"):
        build_model(f"{name}:pretrained", (3, 32, 32), 10, seed=1)


def test_weights_that_cannot_be_had_are_told_with_file_and_place(checkpoints):
    with pytest.raises(FedkitError) as caught:
        build_model("resnet18:pretrained", (3, 32, 32), 10, seed=1)
    sentence = str(caught.value)
    assert "pre-trained weights of resnet18 are not here" in sentence and "no way out" in sentence
    assert f"get https://download.pytorch.org/models/{RESNET18} " in sentence
    assert f"put it at {checkpoints / RESNET18}." in sentence
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("content", [b"", b"not found", b"\x80\x02cos\nsystem\n."])
def test_damaged_weights_are_told_and_never_unpickled(checkpoints, content):
    (checkpoints / RESNET18).write_bytes(content)
    with pytest.raises(FedkitError, match=r"weights of resnet18 can't be read .*f37072fd\.pth\.$"):
        build_model("resnet18:pretrained", (3, 32, 32), 10, seed=1)


def test_weights_of_another_kind_are_told(checkpoints):
    torch.save(["no", "weights"], checkpoints / RESNET18)
    with pytest.raises(FedkitError, match=r"weights of resnet18 can't be read"):
        build_model("resnet18:pretrained", (3, 32, 32), 10, seed=1)


@pytest.mark.parametrize("name", ["lenet", "cnn", "vit", "preresnet18", "mlp"])
def test_networks_without_published_weights_say_so(name):
    with pytest.raises(UsageError, match="pretrained"):
        build_model(f"{name}:pretrained", (3, 32, 32), 10, seed=1)


@pytest.mark.parametrize(
    ("spec", "scratch"),
    [
        ("resnet18:pretrained", "resnet18"),
        ("shufflenet:0.5,pretrained", "shufflenet:0.5"),
        ("shufflenet:pretrained,0.5", "shufflenet:0.5"),
        ("lenet:group", "lenet:group"),
        ("cnn", "cnn"),
        ("preresnet18:0.5,depth=2", "preresnet18:0.5,depth=2"),
    ],
)
def test_the_same_network_without_its_weights_is_named(spec, scratch):
    assert from_scratch(spec) == scratch


def test_shufflenet_takes_its_width_beside_pretrained(checkpoints):
    for spec in ("shufflenet:0.5,pretrained", "shufflenet:pretrained,0.5"):
        with pytest.raises(FedkitError, match="weights of shufflenet_v2_x0_5 are not here"):
            build_model(spec, (3, 32, 32), 10, seed=1)
