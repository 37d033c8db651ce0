"""Where torch computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkit.allocator import keep_freed
from fedkit.errors import FedkitError


def pick_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        FedkitError: that device is not on this machine.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}.get(kind, 0)
    if not count or (number and (not number.isdigit() or int(number) >= count)):
        raise FedkitError(f"There is no device {name!r} on this machine: try --device cpu.")
    return torch.device(name)


def pick_devices(name: str) -> list[torch.device]:
    """As ``pick_device``, for work that can be shared: ``cuda`` and ``auto`` take all GPUs."""
    device = pick_device(name)
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def compute_with(threads: int) -> None:
    """In a process that trains or predicts: so many threads, and memory for a batch serves the next."""
    torch.set_num_threads(threads)
    keep_freed()


def repeatable() -> None:
    """The same seed shall give the same numbers on a GPU, too."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def seed_torch(seed: int) -> None:
    """What ``torch.manual_seed`` does, without its stack traces for devices that are not there."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's own generators (uint8), which dropout and augmentation draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Let torch's own generators go on from there, as far as this device has them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


def leave_to_others(device: torch.device) -> None:
    """Give back what this process holds of a GPU's memory and does not use now.

    Clients that share one GPU take turns more often than not; torch would keep what it once had.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
