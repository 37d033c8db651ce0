"""Synthetic(alpha, beta): the law of the paper, and the same set for everybody."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkit.data.datasets import open_dataset
from fedkit.data.synthetic import CLASSES, DEVICES, FEATURES, generate
from fedkit.errors import UsageError
from fedkit.settings import DataSettings


def opened(spec):
    return open_dataset(spec, DataSettings())


def test_each_device_gives_four_fifths_to_training():
    inputs, labels, owners = generate(1, 1)
    data = opened("synthetic:1,1")
    for device in range(DEVICES):
        mine = owners == device
        count, kept = int(mine.sum()), data.train.owners == device
        assert count >= 50 and int(kept.sum()) == int(0.8 * count)
        given = data.train.take(torch.nonzero(kept).flatten())
        assert np.allclose(given.data.numpy(), inputs[mine][: len(given)], atol=1e-5)
        assert np.array_equal(given.labels.numpy(), labels[mine][: len(given)])
    assert len(data.train) + len(data.test) == len(labels)
    assert data.train.shape == (FEATURES,) and len(data.classes) == CLASSES
    assert torch.equal(data.train.all().inputs(slice(None)), data.train.all().data)


def test_features_vary_as_the_paper_says():
    inputs, _, owners = generate(0, 0)
    largest = np.bincount(owners).argmax()
    mine = inputs[owners == largest]
    expected = np.arange(1, FEATURES + 1) ** -1.2
    # The variance of n normal numbers deviates by sqrt(2 / n) of itself.
    tolerance = 5 * np.sqrt(2 / len(mine))
    assert np.abs(mine.var(axis=0) / expected - 1).max() < tolerance


def test_beta_is_the_standard_deviation_of_the_devices_means():
    def means(beta):
        inputs, _, owners = generate(0, beta)
        return np.array([inputs[owners == device].mean() for device in range(DEVICES)])

    # 60 entries ~ N(B_k, 1): their mean deviates from B_k by 0.13, and is beta apart without it.
    assert means(0).std() < 0.25
    assert 0.6 < means(100).std() / 100 < 1.4  # 30 draws: a deviation of 13 %


def test_alpha_adds_the_same_to_the_scores_of_all_classes_and_so_moves_no_label():
    # True of the paper's own law: u_k stands in every entry of W_k and b_k.
    for alpha in (0.5, 1, 100):
        inputs, labels, owners = generate(alpha, 1)
        expected_inputs, expected, expected_owners = generate(0, 1)
        assert np.array_equal(inputs, expected_inputs) and np.array_equal(owners, expected_owners)
        assert (labels == expected).mean() > 0.999  # rounding may decide where two scores are equal


def test_devices_have_truths_of_their_own():
    _, labels, owners = generate(0, 0)
    shares = [np.bincount(labels[owners == device], minlength=CLASSES) for device in range(DEVICES)]
    assert len({int(share.argmax()) for share in shares}) > 3


def test_iid_devices_share_one_linear_truth():
    inputs, labels, owners = generate(0, 0, iid=True)
    assert np.abs(inputs.mean(axis=0)).max() < 5 / np.sqrt(len(inputs))
    # One linear map explains all devices: learned on half of them, it is right on the others.
    half = owners < DEVICES // 2
    design = np.column_stack([inputs, np.ones(len(inputs))])
    weights = torch.zeros((FEATURES + 1, CLASSES), dtype=torch.float64, requires_grad=True)
    x, y = torch.from_numpy(design[half]), torch.from_numpy(labels[half])
    optimizer = torch.optim.LBFGS([weights], max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weights, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    right = (design[~half] @ weights.detach().numpy()).argmax(axis=1) == labels[~half]
    assert right.mean() > 0.9


def test_the_set_is_the_same_every_time():
    first, again = opened("synthetic:0.5,0.5"), opened("synthetic:0.5,0.5")
    assert torch.equal(first.train.all().data, again.train.all().data)
    assert torch.equal(first.test.labels, again.test.labels)


@pytest.mark.parametrize("argument", ["", ":", ":1", ":1,x", ":-1,1", ":nan,1", ":1,1,1", ":inf,0"])
def test_other_arguments_are_refused(argument):
    with pytest.raises(UsageError, match="two standard deviations"):
        opened(f"synthetic{argument}")
