"""The server's own view of the data: what strategies may know, and what clients are held against."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from threadpoolctl import threadpool_limits

from fedkit.data.splits import cut
from fedkit.durable import make_folder, write_whole
from fedkit.engine.plan import Plan
from fedkit.engine.strategy import Facts
from fedkit.models.build import build_model
from fedkit.models.measure import measure


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
            public_samples=len(data.public),
            public_labels=data.public.labels.numpy() if settings.public_labels else None,
            initial_arrays=lambda: ArrayRecord(self._global_model().state_dict()),
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

    def measure_global(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Accuracy and loss of the global model on the common test set."""
        model = self._global_model()
        model.load_state_dict(arrays.to_torch_state_dict())
        test = self.data.dataset.test
        accuracy, loss = measure(model, test)
        prefix = "global_model/global_test"
        return MetricRecord(
            {f"{prefix}/accuracy": accuracy, f"{prefix}/loss": loss, f"{prefix}/n": len(test)}
        )

    def save_global(self, arrays: ArrayRecord, folder: Path) -> None:
        """Write the global model as a plain state dict."""
        make_folder(folder)
        named = {name: array.numpy() for name, array in arrays.items()}
        write_whole(folder / "global.safetensors", [safetensors.numpy.save(named)])

    def _global_model(self) -> torch.nn.Module:
        data = self.data
        return build_model(self._settings.model, data.shape, data.outputs, self._settings.seed)
