"""How clients' updates travel, and how the server reads them: whole, in fewer bytes, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy, NetworkSize, Traffic
from fedkit.errors import UsageError
from fedkit.flower_records import record_in
from fedkit.knowledge.arrays import name_of, read_array
from fedkit.knowledge.reduction import Arrays
from fedkit.knowledge.relevance import read_threshold
from fedkit.knowledge.updates import compressed, make_update_codec, sent_bytes
from fedkit.settings import key, setting


@dataclass(frozen=True)
class UpdateHyperparameters:
    """How a client's update w_k - w travels to the server, if it does."""

    update_codec: str = setting(
        "float32",
        "how a trained model's update travels to the server: float32 (weights as they are), float16, "
        "int8, or topk:SHARE, as in topk:0.1: of each tensor that share of the largest entries, the "
        "rest added to the client's next update",
        source="top-k: Aji & Heafield 2017, per layer",
    )
    relevance: str = setting(
        "",
        "a client sends its update only if this share of its signs agrees with those of the last global "
        "update, as in 0.6; 0.8,decay: 0.8 / sqrt(round) (default: it always sends)",
        source="CMFL; 0.8 to begin with",
    )


def check_updates(hyper: UpdateHyperparameters) -> None:
    """Raise ``UsageError`` for a codec or a threshold that there is not."""
    make_update_codec(hyper.update_codec)
    read_threshold(hyper.relevance)


def check_weights(hyper: Any) -> None:
    """Raise ``UsageError`` for what is done with weights where none travel (``exchange=logits``)."""
    check_updates(hyper)
    plain = UpdateHyperparameters()
    for name, without in (
        ("update_codec", plain.update_codec),
        ("relevance", plain.relevance),
        ("buffers", "average"),
    ):
        value = getattr(hyper, name)
        if hyper.exchange == "logits" and value != without:
            raise UsageError(
                f"{key(name)}={value} is about weights, and with exchange=logits none travel: set "
                "exchange=weights as well, or leave it out."
            )


def weights_traffic(hyper: Any, network: NetworkSize) -> Traffic:
    """Tensor bytes that a client sends, at most, and takes, where a network's weights travel.

    ``hyper`` has ``BufferHyperparameters`` and ``UpdateHyperparameters``.
    """
    down = network.bytes - (network.statistics if hyper.buffers == "local" else 0)
    up = network.bytes - (network.statistics if hyper.buffers != "average" else 0)
    codec = make_update_codec(hyper.update_codec)
    if codec is not None:
        shapes = network.parameters + network.normalisation
        up += codec.most_bytes(shapes) - 4 * sum(map(math.prod, shapes))
    return up, down


class Reading:
    """Reads the models in the answers of one round, as the hyper-parameters have them come."""

    def __init__(self, strategy: FederatedStrategy) -> None:
        """Nothing read yet; whatever the strategy, weights can come as they are."""
        self._strategy = strategy
        hyper = strategy.hyper
        self._hyper = hyper if isinstance(hyper, UpdateHyperparameters) else UpdateHyperparameters()
        self._codec = make_update_codec(self._hyper.update_codec)
        self._answers = 0
        self._saved = 0
        self._skipped = 0

    def skipped(self, member: Member, content: RecordDict, sent: ArrayRecord) -> bool:
        """Whether a reply says that its update is not relevant, and holds none."""
        self._answers += 1
        if not self._hyper.relevance:
            return False
        told = record_in(content, "metrics", MetricRecord).get("skipped")
        skipped = told == 1 and not content.array_records
        if skipped:
            names = self._strategy.parameters_of(member)
            self._skipped += 1
            self._saved += sent_bytes(self._hyper.update_codec, sent, names)
        return skipped

    def model(self, member: Member, content: RecordDict, sent: ArrayRecord) -> Arrays:
        """The weights w_k in a member's reply to weights w that were ``sent``, in their order.

        Raises:
            ValueError: they are not shaped like those, or not finite.
        """
        if self._codec is None:
            return read_arrays(content.array_records.get("arrays"), sent)
        names = compressed(sent, self._strategy.parameters_of(member))
        before = {name: sent[name].numpy() for name in names}
        others = ArrayRecord({name: array for name, array in sent.items() if name not in before})
        came = read_arrays(content.array_records.get("arrays"), others)
        try:
            record = record_in(content, "update", ArrayRecord)
            update = self._codec.decode(record, [array.shape for array in before.values()])
        except ValueError as error:
            codec = self._hyper.update_codec
            raise ValueError(f"its update is not in the codec {codec}: {error}") from error
        with np.errstate(over="ignore"):
            for name, change in zip(names, update, strict=True):
                came[name] = np.asarray(before[name] + change)
                if not np.isfinite(came[name]).all():
                    raise ValueError(f"{name} is not finite")
        return {name: came[name] for name in sent}

    def tell_skips(self, server_round: int) -> None:
        """Emit which share of the answers held no update, and the bytes that this saved."""
        if not self._hyper.relevance:
            return
        share = self._skipped / self._answers if self._answers else 0.0
        for name, value in (("skipped_share", share), ("bytes_saved", float(self._saved))):
            event = Event("metric", server_round, "train", None, name, value, self._answers)
            self._strategy.emit(event)


def read_arrays(record: ArrayRecord | None, wanted: ArrayRecord) -> Arrays:
    """The arrays of a reply; ``ValueError`` unless they are shaped like ``wanted`` and finite."""
    if record is None or list(record) != list(wanted):
        raise ValueError("it is not the global model's state dict")
    arrays: Arrays = {}
    for name, array in record.items():
        values, model = read_array(name, array), wanted[name]
        if values.shape != tuple(model.shape) or name_of(values.dtype) != model.dtype:
            raise ValueError(
                f"{name} is {values.dtype} {values.shape}, not {model.dtype} {tuple(model.shape)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        arrays[name] = values
    return arrays
