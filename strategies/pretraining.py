"""Learning from the labelled public set before the first round: on each client, or once at the server.

``pretrain=server`` trains each architecture once, all of them side by side, and sends the weights to
every client that runs it (FedLess, arXiv 2402.07295: 3.5 times faster on average). Clients of one
architecture then start identical, which FedMD's own independent starts are not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.numpy
from flwr.app import ArrayRecord

from fedkit import __version__
from fedkit.durable import make_folder, write_whole
from fedkit.engine.strategy import Facts
from fedkit.engine.workers import Workers
from fedkit.knowledge.arrays import as_record
from fedkit.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from fedkit.data.samples import Samples

_log = logging.getLogger(__name__)
Job: TypeAlias = "tuple[str, Samples, Tensor, int, int, int, int, float]"


@dataclass(frozen=True)
class PretrainHyperparameters:
    """Training on the public set before the first round, where its labels are used."""

    pretrain: str = setting(
        "client",
        "who trains on the labelled public set before the first round: each client, or the server "
        "once for each architecture",
        choices=("client", "server"),
        source="FedMD: client; FedLess: server",
    )
    pretrain_epochs: int = setting(
        20,
        "epochs on the public set before the first round (needs public-labels)",
        unit="epochs",
        minimum=0,
        source="FedMD code: at most 20",
    )
    pretrain_batch: int = setting(
        128, "batch size of that", unit="samples", minimum=1, source="FedMD code: 128"
    )
    pretrain_rate: float = setting(
        0.001, "learning rate (Adam) of that", above=0, source="FedMD code: 0.001"
    )
    workers: int = setting(
        0, "processes of the server that train side by side (0: one for each core)", minimum=0
    )


def pretrained(
    facts: Facts, hyper: Any, architectures: Sequence[str], workers: Workers
) -> dict[str, ArrayRecord]:
    """Each architecture's weights after training on the public set; taken from the cache if there.

    The cache ($FEDKIT_CACHE, else ~/.cache/fedkit) knows them by architecture, public digest, seed
    and everything else that the weights depend on.
    """
    folder = cache_folder()
    files = {spec: folder / f"{_key(facts, hyper, spec)}.weights" for spec in architectures}
    found = {spec: weights for spec, file in files.items() if (weights := _read(file)) is not None}
    missing = [spec for spec in architectures if spec not in found]
    jobs: list[Job] = [make_job(facts, hyper, spec) for spec in missing]
    for spec, blob in zip(missing, workers.map(train_on_public, jobs), strict=True):
        make_folder(folder)
        write_whole(files[spec], [hashlib.sha256(blob).digest(), blob])
        found[spec] = _record(blob)
    return found


def train_on_public(job: Job) -> bytes:
    """Train one architecture on the labelled public set; its state dict as safetensors bytes."""
    from fedkit.models.build import build_model
    from fedkit.models.losses import cross_entropy
    from fedkit.models.training import make_optimiser, train
    from fedkit.seeds import derive, torch_generator

    spec, public, labels, outputs, seed, epochs, batch_size, rate = job
    import torch

    model = build_model(spec, public.shape, outputs, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, f"pretrain/{spec}"))
        train(
            model,
            public,
            labels,
            cross_entropy,
            make_optimiser("adam", model, rate),
            epochs=epochs,
            batch_size=batch_size,
            generator=torch_generator(seed, f"pretrain/{spec}"),
        )
    return safetensors.numpy.save({name: t.numpy() for name, t in model.state_dict().items()})


def cache_folder() -> Path:
    """Where weights that can be made again are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDKIT_CACHE") or Path(home) / "fedkit") / "pretrained"


def make_job(facts: Facts, hyper: Any, spec: str) -> Job:
    """What ``train_on_public`` needs to know of one architecture."""
    import torch

    return (
        spec,
        facts.public,
        torch.from_numpy(facts.public_labels),
        facts.outputs,
        facts.settings.seed,
        hyper.pretrain_epochs,
        hyper.pretrain_batch,
        hyper.pretrain_rate,
    )


def _key(facts: Facts, hyper: Any, spec: str) -> str:
    import torch

    # A plug-in's network may be another one tomorrow, under the same name.
    start = hashlib.sha256()
    for name, array in facts.initial_weights(spec).items():
        start.update(name.encode() + array.data)
    depends = [
        __version__,
        torch.__version__,
        spec,
        start.hexdigest(),
        facts.public_digest,
        facts.outputs,
        facts.settings.seed,
        facts.settings.threads,
        hyper.pretrain_epochs,
        hyper.pretrain_batch,
        hyper.pretrain_rate,
    ]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]


def _read(file: Path) -> ArrayRecord | None:
    if not file.exists():
        return None
    try:
        content = file.read_bytes()
        # safetensors itself does not see a bit that has flipped.
        checksum, blob = content[:32], content[32:]
        if hashlib.sha256(blob).digest() != checksum:
            raise ValueError("its checksum is another")
        return _record(blob)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        _log.warning("%s can't be used (%s): training again.", file, error)
        return None


def _record(blob: bytes) -> ArrayRecord:
    # Sorted, because safetensors gives them in any order.
    return as_record(dict(sorted(safetensors.numpy.load(blob).items())))
