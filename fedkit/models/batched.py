"""Several models of one architecture trained at once, as one batched model (``torch.func``).

Their parameters are stacked, one forward and one backward pass is made for all, and each model gets its
own gradients back: weights, and what an optimiser remembers, stay in each model's own tensors. What is
computed is what ``one_by_one`` computes for each; only the order in which floats are added differs.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedkit.models.layerwise import LAMB, LARS
from fedkit.models.losses import cross_entropy
from fedkit.models.training import Steps

# These treat each parameter tensor by itself: one over the parameters of many models is many over one's.
SEPARABLE = (SGD, Adam, AdamW, LARS, LAMB)
# What a layer holds of tensors and other layers.
HELD = ("_parameters", "_buffers", "_modules")
# A label that cross-entropy passes over.
NOBODY = -100


def structure(steps: Steps) -> Hashable:
    """Equal for those that can be trained as one batched model: same network, same kind of samples.

    Two networks are the same if their layers have the same names, types, attributes and tensors' shapes; a
    tensor that is no buffer is one network's own.
    """
    model, samples = steps.model, steps.samples
    layers = tuple(
        (
            path,
            type(layer),
            *((name, _told(value)) for name, value in vars(layer).items() if name not in HELD),
        )
        for path, layer in model.named_modules()
    )
    tensors = tuple(
        (name, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )
    targets = tuple((target.dtype, target.shape[1:]) for target in steps.targets)
    normalised = samples.mean.cpu().numpy().tobytes(), samples.std.cpu().numpy().tobytes()
    augmented = samples.augment is not None
    return layers, tensors, targets, samples.data.dtype, samples.shape, normalised, augmented


def hooked(model: nn.Module) -> bool:
    """Whether hooks watch or change what passes through a model: they are one model's, not many's."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


class Verdict(NamedTuple):
    """Whether a network can be part of a batched model.

    Attributes:
        why_not: a reason, if it can't; empty if it can.
        mixes: whether what it says of one sample hangs on the others of its batch, in training.
    """

    why_not: str
    mixes: bool = True


def examine(steps: Steps) -> Verdict:
    """Try it: two copies of the network, as one model, on batches of two samples; nothing is changed."""
    if steps.samples.augment is not None:
        return Verdict("its samples are augmented, by random numbers of each client's own")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns of an operation that it would take apart into one for each model.
            warnings.simplefilter("error", UserWarning)
            beside_another, beside_itself = _two_samples(steps)[..., 0, :]
    except Exception as error:  # whatever a network's own code raises, or warns of
        if "random operation" in str(error):
            return Verdict("it draws random numbers in training (dropout)")
        return Verdict(str(error).partition("\n")[0].rstrip(".") or type(error).__name__)
    normalises = any(isinstance(layer, _BatchNorm) for layer in steps.model.modules())
    return Verdict("", normalises or not torch.allclose(beside_another, beside_itself))


class Failed(Exception):
    """Training stopped at one of the calls, whose ``number`` this is; the cause says why."""

    def __init__(self, number: int) -> None:
        super().__init__(f"call {number} failed")
        self.number = number


def train_batched(calls: Sequence[Steps], *, mixes: bool) -> list[float]:
    """Take the steps of several calls of one ``structure``; returns each one's mean loss.

    In each step those take part who still have a batch, and the shorter batches are padded; with ``mixes``,
    where padding would be seen, only batches of one size are trained at once, the most frequent first.

    Raises:
        Failed: a call's loss raised something, or all together did; no model is whole then.
    """
    stack = _Stack(calls, mixes)
    try:
        return stack.train()
    except Exception as error:  # a loss is its client's own code, which may raise anything
        raise Failed(stack.at) from error


class _Stack:
    def __init__(self, calls: Sequence[Steps], mixes: bool) -> None:
        self._calls = calls
        self._device = calls[0].samples.data.device
        lengths = [len(call.samples) for call in calls]
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        # By row of all samples together, the next one last.
        self._batches = [
            [batch + start for batch in call.batches][::-1]
            for call, start in zip(calls, starts, strict=False)
        ]
        data = torch.cat([call.samples.data for call in calls])
        self._samples = replace(calls[0].samples, data=data)
        columns = zip(*(call.targets for call in calls), strict=True)
        self._targets = [torch.cat(column) for column in columns]
        labelled = not self._targets[0].is_floating_point()
        self._plain = labelled and all(call.loss is cross_entropy for call in calls)
        self._mixes = mixes
        # Whose loss is computed.
        self.at = 0
        self._parameters = [dict(call.model.named_parameters()) for call in calls]
        self._buffers = [dict(call.model.named_buffers()) for call in calls]
        self._forward = vmap(partial(functional_call, calls[0].model), randomness="error")
        # Those who took part in the last step, and their tensors, which are parts of these.
        self._some: list[int] = []
        self._stacks: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    def train(self) -> list[float]:
        calls, count = self._calls, len(self._calls)
        for call in calls:
            call.model.train()
            call.optimiser.zero_grad(set_to_none=True)
        joint = _joint_optimisers(calls)
        total, seen = torch.zeros(count, device=self._device), [0] * count
        while some := self._next():
            batches = [self._batches[one].pop() for one in some]
            sizes = [len(batch) for batch in batches]
            losses = self._backward(some, batches, sizes)
            for one in some:
                calls[one].finish_gradients()
            for optimiser in joint:
                optimiser.step()  # passes over those that have no gradient
            for one in some:
                _step_alone(calls[one])
                for parameter in self._parameters[one].values():
                    parameter.grad = None
            lost = losses * self._on_device(sizes)
            total.index_add_(0, self._on_device(some), lost.to(total.dtype))
            for one, size in zip(some, sizes, strict=True):
                seen[one] += size
        self._take_apart()
        _give_back(joint, calls)
        sums = total.tolist()
        return [lost / max(n, 1) for lost, n in zip(sums, seen, strict=True)]

    def _next(self) -> list[int]:
        """Who takes part in the next step."""
        left = [one for one, batches in enumerate(self._batches) if batches]
        if not left or not self._mixes:
            return left
        sizes = {one: len(self._batches[one][-1]) for one in left}
        ((size, _),) = Counter(sizes.values()).most_common(1)
        return [one for one in left if sizes[one] == size]

    def _backward(self, some: list[int], batches: list[Tensor], sizes: list[int]) -> Tensor:
        """Give the models that take part their gradients; returns their losses."""
        rows = pad_sequence(batches, batch_first=True).to(self._device)
        inputs = self._samples.inputs(rows.flatten()).view(*rows.shape, *self._samples.shape)
        targets = [target[rows] for target in self._targets]
        parameters, buffers = self._put_together(some)
        logits = self._forward((parameters, buffers), (inputs,))
        losses = self._losses(some, logits, targets, sizes)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for name, stack in parameters.items():
            if stack.grad is not None:
                for one, gradient in zip(some, stack.grad, strict=True):
                    self._parameters[one][name].grad = gradient
                stack.grad = None
        return losses.detach()

    def _put_together(self, some: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of those who take part, stacked; their own are parts of the stacks meanwhile."""
        if some != self._some:
            self._take_apart()
            self._some = some
            self._stacks = (
                _joined([self._parameters[one] for one in some]),
                _joined([self._buffers[one] for one in some]),
            )
            for name, stack in self._stacks[0].items():
                stack.requires_grad_(self._parameters[0][name].requires_grad)
        return self._stacks

    def _take_apart(self) -> None:
        for one in self._some:
            for tensor in (*self._parameters[one].values(), *self._buffers[one].values()):
                tensor.data = tensor.data.clone()

    def _losses(
        self, some: list[int], logits: Tensor, targets: list[Tensor], sizes: list[int]
    ) -> Tensor:
        if not self._plain:
            losses = []
            for row, (self.at, size) in enumerate(zip(some, sizes, strict=True)):
                wanted = (target[row, :size] for target in targets)
                # Of a network with several exits it is exits x samples x classes.
                losses.append(self._calls[self.at].loss(logits[row][..., :size, :], *wanted))
            return torch.stack(losses)
        (labels,) = targets
        counts = self._on_device(sizes)
        beyond = torch.arange(labels.shape[1], device=self._device) >= counts[:, None]
        lost = functional.cross_entropy(
            logits.flatten(0, 1),
            labels.masked_fill(beyond, NOBODY).flatten(),
            ignore_index=NOBODY,
            reduction="none",
        )
        return lost.view(labels.shape).sum(1) / counts

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: torch.stack([mine[name] for mine in tensors]) for name in tensors[0]}


def _joined(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack them by name; from now on each of them is a part of its stack."""
    stacks = _stacked(tensors)
    for name, stack in stacks.items():
        for mine, part in zip(tensors, stack, strict=True):
            mine[name].data = part
    return stacks


def _joins(call: Steps) -> bool:
    """Whether one optimiser may step for this call and others: its rate stays as it is."""
    return isinstance(call.optimiser, SEPARABLE) and call.schedule is None


def _joint_optimisers(calls: Sequence[Steps]) -> list[Optimizer]:
    """One for each kind and choice of options, over the parameters of all that have them."""
    alike: defaultdict[tuple[type[Any], tuple[Any, ...]], list[Tensor]] = defaultdict(list)
    for call in calls:
        for group in call.optimiser.param_groups if _joins(call) else ():
            options = tuple((name, value) for name, value in group.items() if name != "params")
            alike[type(call.optimiser), options] += group["params"]
    joint: list[Optimizer] = []
    for (kind, options), parameters in alike.items():
        optimiser = kind(parameters, lr=dict(options)["lr"])
        optimiser.param_groups[0].update(options)
        joint.append(optimiser)
    known = {p: state for call in calls for p, state in call.optimiser.state.items()}
    for optimiser in joint:
        for parameter in optimiser.param_groups[0]["params"]:
            if parameter in known:
                optimiser.state[parameter] = known[parameter]
    return joint


def _give_back(joint: Sequence[Optimizer], calls: Sequence[Steps]) -> None:
    """Let each call's optimiser remember what the joint ones do of its parameters."""
    known = {p: state for optimiser in joint for p, state in optimiser.state.items()}
    for call in calls:
        for group in call.optimiser.param_groups:
            for parameter in group["params"]:
                if parameter in known:
                    call.optimiser.state[parameter] = known[parameter]


def _step_alone(call: Steps) -> None:
    if not _joins(call):
        call.optimiser.step()
    if call.schedule is not None:
        call.schedule.step()


def _two_samples(steps: Steps) -> Tensor:
    """What two copies of a model, as one, say of two samples each: of unlike ones, and of one twice."""
    shape = 2, 2, *steps.samples.shape
    whole = not len(steps.samples.mean)
    inputs = torch.zeros(
        shape, dtype=torch.int64 if whole else torch.float32, device=steps.samples.data.device
    )
    inputs[:, 0] = 1
    inputs[1, 1] = 1
    parameters = _stacked([dict(steps.model.named_parameters())] * 2)
    buffers = _stacked([dict(steps.model.named_buffers())] * 2)
    forward = vmap(partial(functional_call, steps.model), randomness="error")
    logits = forward((parameters, buffers), (inputs,))
    if not isinstance(logits, Tensor):
        raise TypeError("it gives several answers to each sample")
    return logits


def _told(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
