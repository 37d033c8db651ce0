"""One batch through a network of the user's own, which may do anything."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fedkit.errors import FedkitError, UsageError
from fedkit.models.build import build_model
from fedkit.models.trial import try_one_batch

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


class Own(nn.Module):
    """Three classes from four features, in a way that each test makes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)


def refused(model: nn.Module, inputs: torch.Tensor = INPUTS) -> str:
    with pytest.raises(FedkitError) as caught:
        try_one_batch(model, inputs, 3, "mine:net")
    assert "mine:net" in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def test_a_sound_network_passes_and_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try_one_batch(model, INPUTS, 3, "mine:net")
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_a_network_counts_in_itself_is_as_before():
    class Counting(Own):
        seen = 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return self.linear(inputs)

    model = Counting()
    try_one_batch(model, INPUTS, 3, "mine:net")
    assert model.seen == 0


def test_one_sample_is_enough_for_batch_normalisation():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    try_one_batch(model, INPUTS[:1], 3, "mine:net")


def test_an_exception_is_told_with_its_line_in_the_users_code():
    class Broken(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs[:, :2])

    line = Broken.forward.__code__.co_firstlineno + 1
    sentence = refused(Broken())
    assert "RuntimeError: " in sentence and "evaluation" in sentence
    assert sentence.endswith(f"test_models_trial.py:{line}.")


def test_an_exception_in_training_alone_is_told():
    class Broken(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise LookupError("no such layer")
            return self.linear(inputs)

    assert "in training on two samples (2x4, float32) with LookupError: no such layer" in refused(
        Broken()
    )


def test_a_refusal_in_our_own_words_passes_as_it_is():
    with pytest.raises(UsageError, match=r"^lstm reads sequences of tokens"):
        try_one_batch(build_model("lstm:4", (4,), 3, seed=1), INPUTS, 3, "lstm:4")


def test_a_wrong_shape_is_told():
    assert "gives (2, 5) for two samples in evaluation instead of (2, 3) logits" in refused(
        nn.Linear(4, 5)
    )


def test_more_answers_than_samples_are_told():
    class Doubled(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.cat([inputs, inputs]))

    assert "(4, 3)" in refused(Doubled())


def test_what_is_no_tensor_is_told():
    class Several(Own):
        def forward(self, inputs):
            return self.linear(inputs), inputs

    assert "gives a tuple in evaluation" in refused(Several())


def test_answers_that_are_no_numbers_are_told():
    class Classes(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (self.linear(inputs) > 0).long()

    assert "gives int64 in evaluation" in refused(Classes())


def test_logits_that_are_not_finite_are_told():
    class Divided(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs) / 0

    assert "logits in evaluation that are not finite" in refused(Divided())


def test_gradients_that_are_not_finite_are_told():
    class Rooted(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (self.linear(inputs) * 0).sqrt()

    assert "gradients of linear." in refused(Rooted())


def test_a_failing_way_back_is_told():
    class Back(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("not derived yet")

    class Custom(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return Back.apply(self.linear(inputs))

    assert "fails on the way back (ArithmeticError: not derived yet)" in refused(Custom())


def test_logits_cut_off_from_the_parameters_are_told():
    class Detached(Own):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs).detach()

    assert "do not depend on its parameters" in refused(Detached())


def test_a_network_without_parameters_is_told():
    assert "has no parameters to train" in refused(nn.Flatten())


def test_a_network_that_cannot_be_copied_is_told():
    model = Own()
    model.lock = threading.Lock()
    assert "can't be copied (TypeError: " in refused(model)
