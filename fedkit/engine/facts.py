"""The server's own view of the data: what strategies may know, and what clients are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from threadpoolctl import threadpool_limits
from torch import nn

from fedkit.data.augment import augmentation
from fedkit.data.names import OWN
from fedkit.data.samples import Samples
from fedkit.data.skew import class_counts
from fedkit.data.splits import cut_once
from fedkit.durable import make_folder
from fedkit.engine.plan import Plan
from fedkit.engine.roster import NothingToSend
from fedkit.engine.strategy import Facts, ServerModels
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.models.build import restored
from fedkit.models.device import compute_with
from fedkit.models.files import about_of, save_model
from fedkit.models.measure import measure
from fedkit.models.schedules import largest_batch
from fedkit.registry import split
from fedkit.settings import Value, as_config

Also: TypeAlias = Callable[[str, nn.Module, Samples], Mapping[str, float]]


def _nothing(label: str, model: nn.Module, test: Samples) -> Mapping[str, float]:
    return {}


def _largest_batch(hyper: Mapping[str, Value], rounds: int, *, public_labels: bool) -> int:
    """Of those that clients train with: a device with a memory budget wants to know."""
    elsewhere = {"server-batch"} if public_labels else {"server-batch", "pretrain-batch"}
    sizes = [
        size
        for name, size in hyper.items()
        if "batch" in name.split("-") and name not in elsewhere and isinstance(size, int)
    ]
    private = hyper.get("batch-size", hyper.get("revisit-batch"))
    if isinstance(private, int):
        sizes.append(largest_batch(str(hyper.get("batch-schedule", "")), private, rounds))
    return max(sizes, default=64)


class ServerView:
    """The data set as the server cuts it."""

    def __init__(self, plan: Plan) -> None:
        """Load and cut; raises as ``fedkit.data.splits.cut`` does."""
        self._settings = plan.federation
        compute_with(plan.federation.threads)
        # NumPy's sums hang on the number of threads as well.
        self._limits = threadpool_limits(plan.federation.threads)
        self._send_public = plan.server.send_public
        self._batch_size = _largest_batch(
            as_config(plan.hyper),
            plan.federation.rounds,
            public_labels=plan.federation.public_labels,
        )
        # How much a client trains in a round: a device with a time budget wants to know.
        self._work = {
            "epochs": int(getattr(plan.hyper, "local_epochs", 1)),
            "steps": int(getattr(plan.hyper, "local_steps", 0)),
        }
        self._levels = str(getattr(plan.hyper, "levels", "1"))
        sources = replace(plan.data, allow="")  # as its clients name them
        self.data = cut_once(plan.federation, sources)
        # Told here, and not by every client that joins.
        augmentation(plan.federation.augment, self.data.shape)

    def facts(self) -> Facts:
        """What the strategy may know."""
        settings, data = self._settings, self.data
        # A copy: the tensor moves to shared memory when it is handed to a worker process, and an array
        # over its old place would then read whatever comes to lie there.
        labels = data.public.labels.numpy().copy()
        return Facts(
            settings=settings,
            outputs=data.outputs,
            public=data.public,
            public_digest=data.public_digest,
            public_labels=labels if settings.public_labels else None,
            pool=data.pooled,
        )

    def why_not(self, facts: ConfigRecord) -> str | None:
        """Why a client with these facts may not join, or None."""
        theirs = facts.get("public-digest")
        if theirs != self.data.public_digest:
            return (
                f"Its public set {self._settings.public} differs from the server's in content "
                f"(SHA-256 {str(theirs)[:12]}, not {self.data.public_digest[:12]}): "
                "the files under its data root are others than the server's."
            )
        if facts.get("partition-digest") not in (self.data.partition_digest, OWN):
            return (
                "It deals the data into other shards than the server (another data set under the "
                "same name, or another version of NumPy)."
            )
        known = facts.get("codecs")
        wanted = [split(codec.strip())[0] for codec in self._settings.codec.split(",")]
        if not isinstance(known, list) or not set(known) & set(wanted):
            return (
                f"Logits travel as {self._settings.codec} here, and it knows {known!r} only: "
                "install the same fedkit and plug-ins on both, or add float32 to --codec."
            )
        if facts.get("classes") != list(self.data.classes):
            return f"Its classes are {facts.get('classes')!r}, not {list(self.data.classes)}."
        return None

    def partition(self) -> dict[str, Any]:
        """``partition.json``: what each shard holds, and the digests that both sides compare."""
        labels, names = self.data.dataset.train.labels.numpy(), self.data.classes
        counted = class_counts(labels, self.data.dealt.parts, len(names))
        shards = []
        for number, part in enumerate(self.data.dealt.parts):
            held = {name: int(n) for name, n in zip(names, counted[number], strict=True) if n}
            shards.append(
                {
                    "shard": number,
                    "samples": len(part),
                    "shared": len(self.data.dealt.shared[number]),
                    "classes": dict(sorted(held.items())),
                }
            )
        return {
            "partition": self._settings.partition,
            "num_shards": self._settings.num_shards,
            "seed": self._settings.seed,
            "sha256": self.data.partition_digest,
            "dropped": self.data.dealt.dropped,
            "public": self._settings.public,
            "public_sha256": self.data.public_digest,
            "shards": shards,
        }

    def offer(self, lacks_public: bool) -> RecordDict:
        """What a client is told when it is asked to join; with the public set if it lacks that.

        Raises:
            NothingToSend: the settings say that it is not sent.
        """
        data = self.data
        told: dict[str, int | str] = {
            "agreement": data.agreement.as_json(),
            "batch-size": self._batch_size,
            **self._work,
            "levels": self._levels,
        }
        content = RecordDict({"offer": ConfigRecord({**told})})
        if not lacks_public:
            return content
        if not self._send_public:
            raise NothingToSend(
                f"It has no public set {self._settings.public}, and this server sends none "
                "(--no-send-public): put the files under its data root."
            )
        content["public"] = self._public_record
        return content

    @cached_property
    def _public_record(self) -> ArrayRecord:
        # One for all who lack it.
        return as_record(self.data.public_set.arrays(labels=self._settings.public_labels))

    def measure(self, models: ServerModels, also: Also = _nothing) -> MetricRecord | None:
        """Accuracy and loss of the server's networks on the common test set.

        ``also`` measures what a strategy wants to know beside: ``FederatedStrategy.measured``.
        """
        test, metrics = self.data.common_test, MetricRecord()
        if not len(test):  # every client brings its own data
            return None
        for label, (spec, arrays) in models.items():
            weights = arrays.to_torch_state_dict()
            model = restored(spec, self.data.shape, self.data.outputs, weights)
            prefix = f"{label}_model/global_test"
            metrics[f"{prefix}/accuracy"], metrics[f"{prefix}/loss"] = measure(model, test)
            metrics[f"{prefix}/n"] = len(test)
            metrics.update(also(label, model, test))
        return metrics or None

    def save(self, models: ServerModels, folder: Path, round: int | None = None) -> None:
        """Write the server's networks, as they are after ``round``, as LABEL.safetensors."""
        for label, (spec, arrays) in models.items():
            make_folder(folder)
            named = as_arrays(arrays)
            about = about_of(self.data, spec, round=round)
            save_model(folder / f"{label}.safetensors", named, about)
