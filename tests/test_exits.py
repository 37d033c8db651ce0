"""Networks with an exit after each stage: their tensors, their loss, and leaving early."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkit.data.samples import Samples
from fedkit.errors import UsageError
from fedkit.models.build import build_model, restored
from fedkit.models.cost import cost, training_memory
from fedkit.models.early_exit import costs, leave_early, measure_exits, predict_all
from fedkit.models.exit_loss import joint_loss, read_weights
from fedkit.models.exits import MultiExit, deepest, held_at
from fedkit.models.stages import Stages, named
from fedkit.models.trial import try_one_batch

SMALL, TEXT = (1, 8, 8), (12,)
STAGED = {
    "lenet:batch": 4,
    "cnn": 3,
    "cnn1": 3,
    "mlp:9,8": 2,
    "heterofl-cnn:0.1": 4,
    "preresnet18:0.05": 4,
    "preresnet-1112:0.1,none,depth=3": 3,
    "transformer:0.1": 4,
}
SPECS = sorted(STAGED)


def shape_of(spec: str) -> tuple[int, ...]:
    return TEXT if "transformer" in spec else SMALL


def built(spec: str, *, seed: int = 1) -> nn.Module:
    return build_model(spec, shape_of(spec), 7, seed)


def inputs_of(spec: str, many: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if spec.startswith("transformer"):
        return torch.randint(7, (many, *TEXT), generator=generator)
    return torch.randn(many, *SMALL, generator=generator)


def images(many: int, side: int = 8) -> Samples:
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(0, 256, (many, 1, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 7, (many,), generator=generator)
    return Samples(data, labels, torch.tensor([127.0]), torch.tensor([60.0]))


# The networks.


@pytest.mark.parametrize("spec", SPECS)
def test_a_shallow_network_is_a_part_of_the_deep_one_under_the_same_names(spec):
    deep = built(f"exits:{spec}")
    assert isinstance(deep, MultiExit) and deep.depth == STAGED[spec] == deepest(
        spec, shape_of(spec), 7
    )
    whole = deep.state_dict()
    for depth in range(1, deep.depth + 1):
        shallow = built(f"exits:{depth}:{spec}").state_dict()
        # The same start too, so that a client of any depth begins where the server does.
        assert list(shallow) == held_at(depth, whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in shallow.items())


@pytest.mark.parametrize("spec", SPECS)
def test_in_training_all_exits_answer_and_every_parameter_learns(spec):
    model = built(f"exits:{spec}").train()
    logits = model(inputs_of(spec))
    assert logits.shape == (model.depth, 3, 7) and logits.isfinite().all()
    joint_loss()(logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("spec", SPECS)
def test_each_exit_answers_as_the_plain_network_that_ends_there(spec):
    model, inputs = built(f"exits:{spec}").eval(), inputs_of(spec)
    with torch.inference_mode():
        every = model.every_exit(inputs)
        assert torch.equal(model(inputs), every[-1])
        for at in range(1, model.depth + 1):
            plain = built(f"exit:{at}:{spec}")
            kept = {name: model.state_dict()[name] for name in plain.state_dict()}
            again = restored(f"exit:{at}:{spec}", shape_of(spec), 7, kept).eval()
            torch.testing.assert_close(again(inputs), every[at - 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_left_by_the_last_exit_a_network_has_as_many_parameters_as_ever(spec):
    def count(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(name, shape_of(spec), 7, 1).parameters())

    assert count(f"exit:{STAGED[spec]}:{spec}") == count(spec)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnets_are_left_after_each_of_four_stages(name):
    def tensors(spec: str) -> dict[str, torch.Size]:
        with torch.device("meta"):
            state = build_model(spec, (3, 32, 32), 10, 1).state_dict()
        return {key: tensor.shape for key, tensor in state.items()}

    whole, plain = tensors(f"exits:{name}"), tensors(name)
    for depth in range(1, 5):
        assert tensors(f"exits:{depth}:{name}") == {n: whole[n] for n in held_at(depth, whole)}
    assert list(tensors(f"exit:4:{name}").values()) == list(plain.values())


def test_the_deep_network_is_the_named_one_and_not_another_of_its_size():
    named_one, deep = build_model("lenet", SMALL, 7, 3), build_model("exit:4:lenet", SMALL, 7, 4)
    state = dict(zip(deep.state_dict(), named_one.state_dict().values(), strict=True))
    deep.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(deep(inputs_of("lenet")), named_one(inputs_of("lenet")))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exits:logistic", "logistic has no stages"),
        ("exits:exits:cnn", "exits:cnn has no stages"),
        ("exits:5:lenet", "lenet has 4 stages, not 5"),
        ("exits:0:lenet", "from 1"),
        ("exits:2:", "a network's name after it"),
        ("exit:9:cnn", "cnn has 3 stages, not 9"),
        ("exits:2:nothing", "no model 'nothing'"),
    ],
)
def test_a_network_that_cannot_be_left_is_refused_by_name(spec, says):
    with pytest.raises(UsageError, match=says):
        build_model(spec, SMALL, 7, 1)


class Own(nn.Module):
    """Somebody's own network, which tells where it can be left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 5), nn.Linear(5, 4)

    def stages(self) -> Stages:
        parts = [named(linear=layer, relu=nn.ReLU()) for layer in (self.first, self.second)]
        return Stages(
            nn.Flatten(), parts, lambda features, outputs: nn.Linear(features[1], outputs)
        )


def test_a_network_of_ones_own_tells_its_stages(monkeypatch):
    monkeypatch.setattr("fedkit.models.exits.drawn_now", lambda spec, shape, classes: Own())
    model = build_model("exits:2:mine", SMALL, 7, 1)
    assert model(inputs_of("own")).shape == (2, 3, 7)
    assert "exits.1.weight" in model.state_dict() and "stages.2.linear.weight" in model.state_dict()


def test_a_shallow_network_needs_less_memory_and_passes_the_trial():
    needs = [training_memory(f"exits:{depth}:cnn", SMALL, 7, 16) for depth in (1, 2, 3)]
    assert needs == sorted(set(needs))
    # All exits are trained, so that one more is more than the network alone.
    assert needs[-1] > training_memory("cnn", SMALL, 7, 16)
    try_one_batch(built("exits:cnn"), inputs_of("cnn"), 7, "exits:cnn")


# The loss, against float64 arithmetic written out exit by exit.


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def oracle(z, labels, weights, d, tau):
    exits, batch, _ = z.shape
    total = 0.0
    for i in range(exits):
        weight = weights[min(i, len(weights) - 1)]
        total += weight * -np.log(softmax(z[i])[np.arange(batch), labels]).mean()
        for j in range(exits):
            if j == i or not d:
                continue
            p, q = softmax(z[j] / tau), softmax(z[i] / tau)
            total += d / (exits - 1) * tau**2 * (p * np.log(p / q)).sum(axis=1).mean()
    return total


@given(
    exits=st.integers(1, 5),
    seed=st.integers(0, 99),
    d=st.sampled_from([0.0, 0.3, 1.0]),
    tau=st.sampled_from([0.5, 1.0, 4.0]),
    weights=st.lists(st.floats(0, 3), min_size=1, max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_the_joint_loss_is_the_papers_formula(exits, seed, d, tau, weights):
    rng = np.random.default_rng(seed)
    z, labels = rng.normal(0, 2, (exits, 6, 4)), rng.integers(0, 4, 6)
    found = joint_loss(weights, d, tau)(torch.from_numpy(z), torch.from_numpy(labels))
    assert float(found) == pytest.approx(oracle(z, labels, weights, d, tau), rel=1e-9, abs=1e-9)


def test_a_teacher_gets_no_gradient_from_its_pupils():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0])
    (found,) = torch.autograd.grad(joint_loss((1.0,), 0.7, 2.0)(z, labels), z)
    for i in range(3):
        # Exit i alone moves, the others are numbers.
        one = z[i].detach().clone().requires_grad_()
        p = softmax(z.detach().numpy() / 2.0)
        loss = nn.functional.cross_entropy(one, labels)
        for j in set(range(3)) - {i}:
            log_q = nn.functional.log_softmax(one / 2.0, dim=1)
            loss = loss + 0.7 / 2 * 4 * -(torch.from_numpy(p[j]) * log_q).sum(dim=1).mean()
        (wanted,) = torch.autograd.grad(loss, one)
        torch.testing.assert_close(found[i], wanted, rtol=1e-9, atol=1e-12)


def test_exits_that_agree_have_nothing_to_teach_each_other():
    z = torch.randn(1, 5, 4, dtype=torch.float64).expand(3, 5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    assert float(joint_loss((1.0,), 1.0)(z, labels)) == pytest.approx(
        float(joint_loss()(z, labels))
    )


@pytest.mark.parametrize("text", ["", "x", "0", "0,0", "-1", "nan", "1,,2", "2000"])
def test_weights_that_make_no_loss_are_refused(text):
    with pytest.raises(UsageError, match="exit-weights"):
        read_weights(text)


# Leaving early.


def naive(model: MultiExit, samples: Samples, threshold: float) -> tuple[list[int], list[int]]:
    """One sample after the other, as BranchyNet's algorithm says."""
    answers, exits = [], []
    for at in range(len(samples)):
        for number, z in enumerate(model.every_exit(samples.inputs(slice(at, at + 1))), start=1):
            p = softmax(z.detach().double().numpy())[0]
            entropy = -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))
            if entropy < threshold or threshold >= 1 or number == model.depth:
                answers.append(int(z.argmax()))
                exits.append(number)
                break
    return answers, exits


@pytest.mark.parametrize("threshold", [0.0, 0.8, 0.85, 0.9, 1.0])
def test_leaving_early_is_what_one_sample_after_the_other_would_do(threshold):
    model, samples = confident(), images(150)
    left = leave_early(model, samples, threshold)
    answers, exits = naive(model.eval(), samples, threshold)
    assert left.exits.tolist() == exits and left.logits.argmax(dim=1).tolist() == answers
    if 0 < threshold < 1:
        assert len(set(exits)) == model.depth, "all exits are used, or this tells little"


def confident() -> MultiExit:
    """A network whose exits are sure of some samples and not of others."""
    model = built("exits:cnn")
    assert isinstance(model, MultiExit)
    with torch.no_grad():
        for leave, logits in zip(model.exits, predict_all(model, images(150)), strict=True):
            leave.linear.bias -= logits.mean(dim=0)
            spread = logits.std(dim=0).mean()
            leave.linear.bias /= spread
            leave.linear.weight /= spread
    return model


def test_at_0_all_leave_by_the_last_exit_and_at_1_by_the_first():
    model, samples = built("exits:cnn"), images(20)
    with torch.no_grad():
        for leave in model.exits:
            leave.linear.weight.zero_()
            leave.linear.bias.zero_()
    # No exit can be less sure than one whose class scores are equal, nor surer than the next.
    assert leave_early(model, samples, 1.0).exits.tolist() == [1] * 20
    with torch.no_grad():
        for leave in model.exits:
            leave.linear.bias[3] = 1e4
    assert leave_early(model, samples, 0.0).exits.tolist() == [3] * 20
    assert leave_early(model, samples, 1e-3).exits.tolist() == [1] * 20


def test_the_measurements_are_those_of_a_float64_oracle():
    model, samples = confident(), images(150)
    metrics = measure_exits(model, samples, 0.85)
    answers, exits = naive(model.eval(), samples, 0.85)
    right = np.mean(np.array(answers) == samples.labels.numpy())
    assert metrics["adaptive_model/global_test/accuracy"] == pytest.approx(right, abs=1e-12)
    each = [cost(f"exit:{at}:cnn", SMALL, 7).multiply_adds for at in (1, 2, 3)]
    heads = [leave.linear.weight.numel() for leave in model.exits]
    paid = [each[0], each[1] + heads[0], each[2] + heads[0] + heads[1]]
    assert costs(model, samples.inputs(slice(0, 1))) == paid
    mean = np.mean([paid[at - 1] for at in exits])
    assert metrics["adaptive_model/global_test/multiply_adds"] == pytest.approx(mean)
    for at, logits in enumerate(predict_all(model, samples), start=1):
        assert metrics[f"adaptive_model/global_test/exit-{at}_share"] == exits.count(at) / 150
        wanted = (logits.argmax(dim=1) == samples.labels).double().mean()
        assert metrics[f"exit-{at}_model/global_test/accuracy"] == float(wanted)
