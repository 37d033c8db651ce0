"""What a device itself must have to take part: one finding each, for `fedkit doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fedkit.data.names import OWN, public_parts, resolve_public
from fedkit.errors import FedkitError
from fedkit.link.reach import FAIL, OK, WARNING, Finding
from fedkit.registry import split
from fedkit.settings import DataSettings, FederationSettings, build

# What a client with a small network takes: torch alone is half a gigabyte.
LITTLE_MEMORY = 1 << 30
LITTLE_DISK = 1 << 30
NO_DISK = 1 << 26


def find_state(folder: Path) -> Finding:
    """Whether the device's model can be kept there; nothing is left behind."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"fedkit")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = (
            f"{folder} can't be written ({error.strerror or error}): give a --state-dir that this "
            "user may write to."
        )
        return Finding("state", FAIL, text)
    free = shutil.disk_usage(place).free
    text, values = f"{folder} can be written, {free / 1e9:.1f} GB are free", {"free_bytes": free}
    if free < LITTLE_DISK:
        status = FAIL if free < NO_DISK else WARNING
        return Finding("state", status, f"{text}: a model and its copies need room.", values)
    return Finding("state", OK, text, values)


def find_memory() -> Finding:
    """Memory that is free now (where the system tells; else all that there is)."""
    page = os.sysconf("SC_PAGE_SIZE")
    whole = page * os.sysconf("SC_PHYS_PAGES")
    free = _available()
    values = {"total_bytes": whole, "available_bytes": free}
    if free is None:
        status = WARNING if whole < LITTLE_MEMORY else OK
        return Finding("memory", status, f"{whole / 1e9:.1f} GB in all", values)
    text = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    if free < LITTLE_MEMORY:
        return Finding("memory", WARNING, f"{text}: training may need more.", values)
    return Finding("memory", OK, text, values)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    kilobytes = found.get("MemAvailable", "").removesuffix("kB").strip()
    return int(kilobytes) * 1024 if kilobytes else None


def find_device(name: str) -> Finding:
    """Whether torch computes on the device of that name."""
    import torch

    from fedkit.models.device import pick_device

    try:
        device = pick_device(name)
        torch.ones(2, device=device).sum().item()
    except FedkitError as error:
        return Finding("device", FAIL, str(error))
    except RuntimeError as error:
        text = f"torch can't compute on {name}: {str(error).splitlines()[0]}: try --device cpu."
        return Finding("device", FAIL, text)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    text = f"torch {torch.__version__} computes on {label}{threads}"
    return Finding("device", OK, text, {"device": str(device), "torch": torch.__version__})


def find_data(run_config: dict[str, Any], digest: str | None, sources: DataSettings) -> Finding:
    """Whether the federation's data are here, and the public set is the server's.

    Args:
        run_config: the federation's settings, as the server told them.
        digest: of the server's public set; None while the server does not know it.
        sources: where this machine keeps data sets.
    """
    from fedkit.data.splits import cut

    try:
        settings = build(FederationSettings, run_config)
        if split(settings.dataset)[0] == OWN:
            text = "every device brings its own data; `fedkit data check` tells what they give"
            return Finding("data", OK, text, {"dataset": settings.dataset})
        data = cut(settings, sources)
    except FedkitError as error:
        return _without_public(run_config, sources) or Finding("data", FAIL, str(error))
    ours, public = data.public_digest, data.settings.public
    values = {"dataset": settings.dataset, "public": public, "sha256": ours}
    if digest is None:
        text = f"{settings.dataset} is here; the server has not read its own yet: ask it again."
        return Finding("data", WARNING, text, values)
    if digest != ours:
        text = (
            f"The public set {public} differs from the server's (SHA-256 {ours[:12]}, not "
            f"{digest[:12]}): the files under this device's data root are others."
        )
        return Finding("data", FAIL, text, values)
    text = f"{settings.dataset} is here, and the public set {public} is the server's"
    return Finding("data", OK, text, values)


def _without_public(run_config: dict[str, Any], sources: DataSettings) -> Finding | None:
    """A warning if the public set alone is not here: another data set, which the server may send."""
    from fedkit.data.datasets import open_dataset

    try:
        settings = build(FederationSettings, run_config)
        name, _ = public_parts(resolve_public(settings))
        open_dataset(settings.dataset, sources)
    except FedkitError:
        return None
    if name == settings.dataset:
        return None
    text = (
        f"{settings.dataset} is here, and the public set {settings.public} is not, or does not fit: the "
        "server sends its own, unless it was started with --no-send-public."
    )
    values = {"dataset": settings.dataset, "public": settings.public}
    return Finding("data", WARNING, text, values)
