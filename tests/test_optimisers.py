"""The optimisers of local training against the papers' formulas in NumPy, and the proximal pull."""

import numpy as np
import pytest
import torch
from torch import nn

from clients import memory
from fedkit.data.samples import Samples
from fedkit.flower import new_context
from fedkit.models.losses import cross_entropy
from fedkit.models.training import Pull, make_optimiser, one_epoch, take_steps
from fedkit.seeds import torch_generator


class Layers(nn.Module):
    """A layer, a bias, a layer whose weights are all 0, and one that gets no gradient."""

    def __init__(self):
        super().__init__()
        draw = torch_generator(3, "layers")
        self.layer = nn.Parameter(torch.randn(4, 3, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=draw, dtype=torch.float64))
        self.kernel = nn.Parameter(torch.randn(2, 3, 2, 2, generator=draw, dtype=torch.float64))
        self.zero = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))


def gradients(step):
    """What each parameter's gradient is in a step; the kernel's is 0 in one of them."""
    draw = np.random.default_rng(step)
    found = {"layer": draw.normal(size=(4, 3)), "bias": draw.normal(size=4)}
    found["kernel"] = draw.normal(size=(2, 3, 2, 2)) * (step != 2)
    found["zero"] = draw.normal(size=(2, 2)) * (step == 1)
    return found


def stepped(optimiser, model, steps):
    for step in steps:
        for name, gradient in gradients(step).items():
            model.get_parameter(name).grad = torch.from_numpy(gradient)
        optimiser.step()
    return {name: one.detach().numpy().copy() for name, one in model.named_parameters()}


def lars(weights, steps, rate, momentum, decay, trust):
    """You et al. 2017, algorithm 1, layer by layer; biases plain."""
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in steps:
        for name, g in gradients(step).items():
            w, local = weights[name], 1.0
            if w.ndim > 1:
                length, slope = np.linalg.norm(w), np.linalg.norm(g)
                if length > 0 and slope > 0:
                    local = trust * length / (slope + decay * length)
                g = g + decay * w
            velocity[name] = momentum * velocity[name] + rate * local * g
            weights[name] = w - velocity[name]
    return weights


def lamb(weights, steps, rate, decay, b1=0.9, b2=0.999, eps=1e-6):
    """You et al. 2020, algorithm 2 with phi the identity, layer by layer; biases as Adam."""
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, step in enumerate(steps, 1):
        for name, g in gradients(step).items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            update = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            ratio = 1.0
            if weights[name].ndim > 1:
                update = update + decay * weights[name]
                length, size = np.linalg.norm(weights[name]), np.linalg.norm(update)
                ratio = length / size if length > 0 and size > 0 else 1.0
            weights[name] = weights[name] - rate * ratio * update
    return weights


def start():
    return {name: one.detach().numpy().copy() for name, one in Layers().named_parameters()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_steps_as_the_paper_writes(momentum, decay):
    model = Layers()
    optimiser = make_optimiser(
        "lars", model, 0.5, momentum=momentum, decay=decay, trust=0.02
    )  # fmt: skip
    found = stepped(optimiser, model, range(6))
    for name, wanted in lars(start(), range(6), 0.5, momentum, decay, 0.02).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12, atol=1e-14)
    assert (found["idle"] == 1).all()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_steps_as_the_paper_writes(decay):
    model = Layers()
    found = stepped(make_optimiser("lamb", model, 0.02, decay=decay), model, range(6))
    for name, wanted in lamb(start(), range(6), 0.02, decay).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12, atol=1e-14)
    assert (found["idle"] == 1).all()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "lamb"])
def test_an_optimiser_goes_on_from_its_kept_state_to_the_bit(name):
    unbroken, model = Layers(), Layers()
    wanted = stepped(
        make_optimiser(name, unbroken, 0.1, momentum=0.9, decay=0.1), unbroken, range(5)
    )
    first = make_optimiser(name, model, 0.1, momentum=0.9, decay=0.1)
    stepped(first, model, range(3))
    context = new_context(2, {})
    memory.keep_optimiser(context, "own", first)
    second = make_optimiser(name, model, 0.1, momentum=0.9, decay=0.1)
    memory.recall_optimiser(context, "own", second)
    found = stepped(second, model, range(3, 5))
    assert all((found[one] == wanted[one]).all() for one in wanted)


def test_weight_decay_is_apart_from_the_gradient_in_adamw_alone():
    """With gradients of 0 SGD and AdamW shrink by rate x decay, Adam by its own step."""
    for name, shrunk in (("sgd", 0.99), ("adamw", 0.99), ("adam", 0.9)):
        model = nn.Linear(2, 2, dtype=torch.float64)
        before = model.weight.detach().clone()
        optimiser = make_optimiser(name, model, 0.1, decay=0.1)
        for one in model.parameters():
            one.grad = torch.zeros_like(one)
        optimiser.step()
        if name == "adam":  # a gradient of 0.1 w, whose size Adam does not see: a step of the rate
            wanted = before - 0.1 * before.sign()
            torch.testing.assert_close(model.weight.detach(), wanted, rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(model.weight.detach(), shrunk * before)


# The pull


def few(count=12, width=3, classes=2):
    draw = torch_generator(1, "few")
    data = torch.randn(count, width, generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    return Samples(data, labels, torch.zeros(width), torch.ones(width))


def linear():
    torch.manual_seed(7)
    return nn.Linear(3, 2)


def trained(model, pull, *, steps=1, rate=0.1, clip=0.0, loss=cross_entropy):
    samples = few()
    whole = [torch.arange(len(samples))] * steps
    optimiser = make_optimiser("sgd", model, rate)
    take_steps(model, samples, samples.labels, loss, optimiser, whole, pull=pull, clip=clip)
    return [one.detach().clone() for one in model.parameters()]


def test_the_pull_is_the_gradient_of_the_proximal_term():
    model = linear()
    pull = Pull.where(model, 0.7)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn_like(one))
    term = sum(
        (one - w).square().sum() for one, w in zip(model.parameters(), pull.toward, strict=True)
    )
    wanted = torch.autograd.grad(0.7 / 2 * term, list(model.parameters()))
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    pull.add_to(model)
    for one, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(one.grad, 1 + gradient)


def test_it_is_a_copy_that_training_does_not_move():
    model = linear()
    pull = Pull.where(model, 1.0)
    before = [w.clone() for w in pull.toward]
    trained(model, pull, steps=3)
    assert all(w.equal(was) for w, was in zip(pull.toward, before, strict=True))
    assert not any(w.requires_grad for w in pull.toward)


def test_where_training_begins_nothing_pulls_to_the_bit():
    """Spec 2 (b): of one full batch one step is that of no pull, for any mu."""
    plain = trained(linear(), None)
    for mu in (0.0, 0.1, 1e6):
        model = linear()
        assert all(
            a.equal(b) for a, b in zip(trained(model, Pull.where(model, mu)), plain, strict=True)
        )


def test_no_pull_is_no_number_less():
    """0 times infinity would be."""
    model = linear()
    pull = Pull(0.0, [torch.full_like(one, torch.inf) for one in model.parameters()])
    assert all(
        a.equal(b) for a, b in zip(trained(model, pull), trained(linear(), None), strict=True)
    )


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_a_quadratic_is_solved_where_the_closed_form_says(mu):
    """Spec 2 (c): F = 1/2 ||w - a||^2, to convergence: w = (a + mu w_t) / (1 + mu)."""
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    start, target = model.weight.detach().clone(), torch.arange(6.0).view(2, 3).double()
    pull = Pull.where(model, mu)
    optimiser = make_optimiser("sgd", model, 0.2)
    for _ in range(400):
        optimiser.zero_grad()
        (0.5 * (model.weight - target).square().sum()).backward()
        pull.add_to(model)
        optimiser.step()
    torch.testing.assert_close(model.weight.detach(), (target + mu * start) / (1 + mu))


def test_the_larger_mu_the_nearer_it_stays():
    """Spec 2 (d), on a convex problem."""
    distances = []
    for mu in (0.0, 0.01, 0.1, 1.0, 5.0):
        model = linear()
        pull = Pull.where(model, mu)
        after = trained(model, pull, steps=60)
        moved = sum((a - w).square().sum() for a, w in zip(after, pull.toward, strict=True))
        distances.append(float(moved))
    assert distances == sorted(distances, reverse=True) and distances[0] > 4 * distances[-1]


def test_the_clip_bounds_gradient_and_pull_together():
    model = linear()
    toward = [one.detach() + 100 for one in model.parameters()]
    before = [one.detach().clone() for one in model.parameters()]
    after = trained(model, Pull(10.0, toward), rate=1.0, clip=0.5)
    step = sum((a - b).square().sum() for a, b in zip(after, before, strict=True)) ** 0.5
    assert float(step) == pytest.approx(0.5, rel=1e-4)


def test_the_loss_told_is_without_the_pull():
    model, samples = linear(), few()
    expected = float(cross_entropy(model(samples.data), samples.labels).detach())
    pull = Pull(5.0, [one.detach() + 1 for one in model.parameters()])
    batches = one_epoch(len(samples), len(samples), torch_generator(1, "order"))
    told = take_steps(
        model,
        samples,
        samples.labels,
        cross_entropy,
        make_optimiser("sgd", model, 0.1),
        batches,
        pull=pull,
    )
    assert told == pytest.approx(expected)
