"""The server's own view of the data: what strategies may know, and what clients are held against."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord
from threadpoolctl import threadpool_limits

from fedkit.data.splits import cut
from fedkit.durable import make_folder
from fedkit.engine.plan import Plan
from fedkit.engine.strategy import Facts, ServerModels
from fedkit.models.build import build_model
from fedkit.models.files import about_of, save_model
from fedkit.models.measure import measure
from fedkit.registry import split


class ServerView:
    """The data set as the server cuts it."""

    def __init__(self, plan: Plan) -> None:
        """Load and cut; raises as ``fedkit.data.splits.cut`` does."""
        self._settings = plan.federation
        torch.set_num_threads(plan.federation.threads)
        # NumPy's sums hang on the number of threads as well.
        self._limits = threadpool_limits(plan.federation.threads)
        self.data = cut(plan.federation, plan.data)

    def facts(self) -> Facts:
        """What the strategy may know."""
        settings, data = self._settings, self.data
        return Facts(
            settings=settings,
            outputs=data.outputs,
            public=data.public,
            public_digest=data.public_digest,
            public_labels=data.public_targets().numpy() if settings.public_labels else None,
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
        if facts.get("partition-digest") != self.data.partition_digest:
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
        if facts.get("classes") != list(self.data.dataset.classes):
            return (
                f"Its classes are {facts.get('classes')!r}, not {list(self.data.dataset.classes)}."
            )
        return None

    def partition(self) -> dict[str, Any]:
        """``partition.json``: what each shard holds, and the digests that both sides compare."""
        labels = self.data.dataset.train.labels.numpy()
        names = self.data.dataset.classes
        shards = []
        for number, part in enumerate(self.data.shards):
            counts = Counter(names[label] for label in labels[part].tolist())
            shards.append(
                {"shard": number, "samples": len(part), "classes": dict(sorted(counts.items()))}
            )
        return {
            "partition": self._settings.partition,
            "num_shards": self._settings.num_shards,
            "seed": self._settings.seed,
            "sha256": self.data.partition_digest,
            "public": self._settings.public,
            "public_sha256": self.data.public_digest,
            "shards": shards,
        }

    def measure(self, models: ServerModels) -> MetricRecord | None:
        """Accuracy and loss of the server's networks on the common test set."""
        test, metrics = self.data.dataset.test, MetricRecord()
        for label, (spec, arrays) in models.items():
            model = build_model(spec, self.data.shape, self.data.outputs, self._settings.seed)
            model.load_state_dict(arrays.to_torch_state_dict())
            prefix = f"{label}_model/global_test"
            metrics[f"{prefix}/accuracy"], metrics[f"{prefix}/loss"] = measure(model, test)
            metrics[f"{prefix}/n"] = len(test)
        return metrics or None

    def save(self, models: ServerModels, folder: Path, round: int | None = None) -> None:
        """Write the server's networks, as they are after ``round``, as LABEL.safetensors."""
        for label, (spec, arrays) in models.items():
            make_folder(folder)
            named = {name: array.numpy() for name, array in arrays.items()}
            about = about_of(self.data, spec, round=round)
            save_model(folder / f"{label}.safetensors", named, about)
