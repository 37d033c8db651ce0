"""What a network costs: parameters, multiply-adds, bytes, memory to train it. Nothing is allocated.

Networks are built and run on torch's meta device, which knows shapes and has no numbers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fedkit.errors import FedkitError
from fedkit.models.build import build_model, state_bytes
from fedkit.models.exit_loss import joint_loss
from fedkit.models.exits import MultiExit
from fedkit.models.losses import cross_entropy

# Measured: `python benchmarks/memory.py`.
RECURRENT = 2.5


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: scalars that are trained (running statistics are none).
        multiply_adds: of one sample's forward pass, in convolutions, matrix products and attention.
        bytes: of its state dict, running statistics included.
    """

    parameters: int
    multiply_adds: int
    bytes: int


def cost(spec: str, shape: tuple[int, ...], classes: int, *, tokens: bool = False) -> Cost:
    """What the network ``spec`` costs on samples of this shape.

    Args:
        spec: a model's name, with its argument.
        shape: of one sample.
        classes: number of logits.
        tokens: whether samples are sequences of tokens (int64) and not numbers (float32).

    Raises:
        UsageError: there is no such model, or it can't read such samples.
        FedkitError: its own code does not run on the meta device.
    """
    model = _on_meta(spec, shape, classes).eval()
    inputs = _inputs(1, shape, torch.int64 if tokens else torch.float32)
    # Attention's fast path in inference, one operation, would count as none.
    with FlopCounterMode(display=False) as counter:
        _run(spec, lambda: model(inputs))
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
        bytes=state_bytes(model),
    )


def training_memory(
    model: nn.Module | str,
    shape: tuple[int, ...],
    classes: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    moments: int = 2,
) -> int:
    """Bytes that training a network takes at its peak, without torch itself.

    Weights, buffers and moments, and the most that lives at once of gradients, activations and one
    batch while that goes forward and back. oneDNN's LSTM keeps two and a half times what its steps
    need (docs/models.md), which is allowed for; fused attention less than is said.

    Args:
        model: a network, which is left as it is, or a model's name.
        shape: of one sample.
        classes: number of logits.
        batch_size: samples in a batch.
        dtype: of the samples: float32, or int64 for tokens.
        moments: that the optimiser keeps for each weight: 2 for Adam, 1 for SGD with momentum, else 0.

    Raises:
        UsageError: there is no such model, or it can't read such samples.
        FedkitError: its own code does not run on the meta device, so that only trying tells.
    """
    name = model if isinstance(model, str) else type(model).__name__
    copied = _on_meta(model, shape, classes).train()
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    memory = _Memory([*copied.parameters(), *copied.buffers()])
    with memory:
        inputs = _inputs(batch_size, shape, dtype)
        labels = torch.empty(batch_size, dtype=torch.int64, device="meta")
        loss = joint_loss() if isinstance(copied, MultiExit) else cross_entropy
        _run(name, lambda: backward(loss(copied(inputs), labels)))
    kept = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    recurrent = any(isinstance(module, nn.RNNBase) for module in copied.modules())
    if recurrent and memory.peak > 2 * kept:
        return int(RECURRENT * (memory.peak - 2 * kept)) + (2 + moments) * kept
    return memory.peak + moments * kept


def prediction_memory(
    model: nn.Module | str,
    shape: tuple[int, ...],
    classes: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that predicting a batch takes at its peak, weights included; else as ``training_memory``."""
    name = model if isinstance(model, str) else type(model).__name__
    copied = _on_meta(model, shape, classes).eval()
    memory = _Memory([*copied.parameters(), *copied.buffers()])
    with torch.no_grad(), memory:
        inputs = _inputs(batch_size, shape, dtype)
        _run(name, lambda: copied(inputs))
    return memory.peak


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what operations allocate and what is freed; ``peak`` is the most there was, in bytes."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result)
        return results

    def _add(self, tensor: Tensor) -> None:
        # Views share a storage, which lives until the last of them is gone.
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self._now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)


def _on_meta(model: nn.Module | str, shape: tuple[int, ...], classes: int) -> nn.Module:
    if isinstance(model, str):
        try:
            with torch.device("meta"):
                return build_model(model, shape, classes, seed=0)
        except (RuntimeError, NotImplementedError) as error:  # from somebody's own code
            raise _unmeasured(model, error) from error
    # A deep copy that finds a tensor without numbers wherever it comes upon one of the model's.
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _run(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except FedkitError:
        raise
    except Exception as error:  # whatever somebody's own code raises where there are no numbers
        raise _unmeasured(name, error) from error


def _unmeasured(name: str, error: Exception) -> FedkitError:
    return FedkitError(
        f"What the model {name} costs can't be told without running it: on torch's meta device it "
        f"raises {type(error).__name__}: {error}."
    )


def _inputs(many: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(many, *shape, dtype=dtype, device="meta")
