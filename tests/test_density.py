"""Which public samples resemble a client's own: the density ratio, and the mask that is made of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from inprocess import InProcessFederation
from scipy.spatial.distance import cdist

from clients import density
from clients.density import density_ratio, resembling
from clients.edge import edge_of
from fedkit.engine.plan import make_plan
from strategies.fedmd import FedMDHyperparameters

WIDTH = FedMDHyperparameters().kernel_width
RATIO = FedMDHyperparameters().density_ratio


def oracle(private, public, basis, width):
    """KuLSIF as Kanamori et al. pose it, minimised without its closed form (float64).

    J(r) = 1/2 mean_j r(u_j)^2 - mean_i r(x_i) + lambda/2 |r|^2 over the functions r of the kernel's
    space; the best one is a sum of kernels at all samples z, r = sum_l t_l k(., z_l), and J is then
    1/2n |K_u t|^2 - mean(K_x t) + lambda/2 t'Kt, a quadratic form in t.
    """
    known = public[basis]
    scale = width * np.quantile(cdist(known, private), 0.5, method="lower")
    points = np.concatenate([known, private])
    n, m = len(known), len(private)

    def kernel(one, other):
        return np.exp(-(cdist(one, other) ** 2) / (2 * scale**2))

    penalty = min(n, m) ** -0.9
    at_known, at_private = kernel(known, points), kernel(private, points)
    quadratic = at_known.T @ at_known / n + penalty * kernel(points, points)
    best = np.linalg.lstsq(quadratic, at_private.mean(axis=0), rcond=1e-14)[0]
    return kernel(public, points) @ best


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n, d = draw(st.integers(2, 12)), draw(st.integers(2, 12)), draw(st.integers(1, 5))
    private = rng.standard_normal((m, d)) + draw(st.sampled_from([0.0, 1.0]))
    public = rng.standard_normal((n + draw(st.integers(0, 5)), d)) * draw(st.sampled_from([1, 2]))
    return private, public, rng.permutation(len(public))[:n]


@examples(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0.3, 0.7, 1.5]))
def test_the_ratio_is_the_minimum_of_kulsif(case, width):
    private, public, basis = case
    found = density_ratio(*map(torch.from_numpy, case), width)
    assert found.dtype == torch.float64
    wanted = oracle(private, public, basis, width)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_the_ratio_of_equal_samples_is_near_one():
    """Both sets from one law: on average as many of the one as of the other."""
    rng = np.random.default_rng(1)
    private, public = (torch.from_numpy(rng.standard_normal((300, 2))) for _ in range(2))
    ratio = density_ratio(private, public, torch.arange(300), 0.5)
    assert 0.8 < float(ratio.mean()) < 1.1
    assert float((ratio - 1).abs().median()) < 0.3


def test_the_ratio_follows_the_true_one():
    """x from N(1, 1), u from N(0, 1): the ratio of their densities is exp(x - 1/2)."""
    rng = np.random.default_rng(2)
    private = torch.from_numpy(rng.standard_normal((800, 1)) + 1)
    public = torch.from_numpy(rng.standard_normal((800, 1)))
    ratio = density_ratio(private, public, torch.arange(800), 1.0).numpy()
    true = np.exp(public.numpy()[:, 0] - 0.5)
    inner = np.abs(public.numpy()[:, 0]) < 1.5
    assert np.corrcoef(ratio[inner], true[inner])[0, 1] > 0.97
    np.testing.assert_allclose(ratio[inner], true[inner], atol=0.6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 64]))
@examples(max_examples=20, deadline=None)
def test_strangers_get_a_low_ratio_and_copies_a_high_one(seed, dimensions):
    rng = np.random.default_rng(seed)
    private = rng.standard_normal((40, dimensions))
    # At 8 the outermost of two dimensions come near each other once in some thousand draws.
    strangers = rng.standard_normal((40, dimensions)) + 12
    public = torch.from_numpy(np.concatenate([private, strangers]))
    basis = torch.from_numpy(rng.permutation(80))
    ratio = density_ratio(torch.from_numpy(private), public, basis, WIDTH)
    # Half of the public samples are the private ones: their share there is twice what it is here.
    assert float(ratio[:40].min()) > 0.5
    assert float(ratio[40:].max()) < 0.001


def test_the_ratio_does_not_depend_on_units_or_on_order():
    rng = np.random.default_rng(3)
    private, public = (torch.from_numpy(rng.standard_normal((30, 4))) for _ in range(2))
    basis = torch.arange(20)
    ratio = density_ratio(private, public, basis, WIDTH)
    scaled = density_ratio(private * 255 + 7, public * 255 + 7, basis, WIDTH)
    np.testing.assert_allclose(scaled, ratio, rtol=1e-6, atol=1e-9)
    turned = density_ratio(private.flip(0), public, basis.flip(0), WIDTH)
    np.testing.assert_allclose(turned, ratio, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5])
def test_samples_that_are_all_the_same_are_no_trouble(count):
    same = torch.ones((count, 3), dtype=torch.float64)
    ratio = density_ratio(same, same, torch.arange(count), WIDTH)
    assert torch.isfinite(ratio).all()
    assert (ratio >= RATIO).all()


# On images


def edges(**settings):
    settings = {"strategy": "fedmd", "partition": "classes:2", "alone": False, **settings}
    settings |= {"public": settings.get("public", "digits:400"), "models": "lenet"}
    run = InProcessFederation(clients=5, **settings)
    for client in range(5):
        context = run.context(client)
        yield edge_of(context)


def quality(edge, mask):
    """Precision and recall of a mask as a guess which public samples are of the client's classes."""
    own = np.isin(edge.public.labels.numpy(), np.unique(edge.private.train.labels.numpy()))
    return (mask & own).sum() / mask.sum(), (mask & own).sum() / own.sum(), own.mean()


@pytest.mark.parametrize("seed", [1, 2])
def test_what_resembles_is_mostly_of_the_clients_own_classes(seed):
    """No labels are used: at the defaults nearly all of the own classes, and few others."""
    found = [quality(edge, resembling(edge, WIDTH, RATIO)) for edge in edges(seed=seed)]
    precision, recall, share = np.mean(found, axis=0)
    assert share < 0.25
    assert precision > 0.55
    assert recall > 0.9
    assert min(one[0] for one in found) > 2 * share
    assert min(one[1] for one in found) > 0.8


def test_a_higher_threshold_says_less_and_more_surely():
    (edge, *_) = edges()
    masks = []
    for ratio in (RATIO / 2, RATIO, RATIO * 2):
        edge.resembling = None
        masks.append(resembling(edge, WIDTH, ratio))
    for more, fewer in ((masks[0], masks[1]), (masks[1], masks[2])):
        assert (fewer <= more).all()
        assert fewer.sum() < more.sum()
        assert quality(edge, fewer)[0] > quality(edge, more)[0]


def test_other_ways_of_asking_give_the_same_mask():
    """The same at every call and in every process: it is drawn from the seed and the client alone."""
    first = [resembling(edge, WIDTH, RATIO) for edge in edges()]
    second = [resembling(edge, WIDTH, RATIO) for edge in edges()]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first[0] != first[1]).any()


def test_few_basis_points_say_nearly_the_same(monkeypatch):
    whole = [resembling(edge, WIDTH, RATIO) for edge in edges()]
    monkeypatch.setattr(density, "BASIS", 200)
    part = [resembling(edge, WIDTH, RATIO) for edge in edges()]
    agree = np.mean([(one == other).mean() for one, other in zip(whole, part, strict=True)])
    assert 0.8 < agree <= 1


def test_labels_of_the_public_set_do_not_matter():
    masks = []
    for wrong in (False, True):
        (edge, *_) = edges()
        if wrong:
            edge.public.labels.fill_(0)
        masks.append(resembling(edge, WIDTH, RATIO))
    np.testing.assert_array_equal(*masks)


def test_the_preset_asks_for_it():
    hyper = make_plan({"strategy": "fedmd", "preset": "selective"}, local=True).hyper
    assert (hyper.speak_about, hyper.space) == ("resembling", "prob")
    assert make_plan({"strategy": "fedmd"}, local=True).hyper.speak_about == "all"
