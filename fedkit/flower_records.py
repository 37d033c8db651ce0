"""Flower's records as its protobuf describes them, without the arrays' bytes.

What Flower's own ``serde`` makes and reads, to the byte, for a third of the time: it makes every array
three times over, and looks into each argument of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import (
    config_record_from_proto,
    config_record_to_proto,
    metric_record_from_proto,
    metric_record_to_proto,
)
from flwr.proto.recorddict_pb2 import Array as ProtoArray
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

MOST_DIMENSIONS = 64
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def new_array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """As ``Array(dtype, shape, stype, data)``, for what is known to be of these types."""
    array = Array.__new__(Array)
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def new_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """As ``ArrayRecord(arrays)``, which copies each."""
    record = ArrayRecord()
    record.__dict__["_data"].update(arrays)
    return record


def record_in(records: RecordDict, name: str, kind: type[Record]) -> Record:
    """The record of that name and kind, or an empty one: Flower's views by kind copy all there are."""
    record = records.get(name)
    return record if isinstance(record, kind) else kind()


@lru_cache(maxsize=64)
def itemsize(dtype: str) -> int:
    """Bytes of one value; NumPy raises many kinds for what is no type's name."""
    return np.dtype(dtype).itemsize


def describe(records: RecordDict) -> tuple[ProtoRecordDict, list[bytes]]:
    """Records without the bytes of their arrays, and these, which are not copied."""
    described, blobs = ProtoRecordDict(), []
    for name, record in records.items():
        item = described.items.add(key=name)
        if isinstance(record, ArrayRecord):
            item.array_record.SetInParent()  # it may be empty
            for key, array in record.items():
                value = ProtoArray(dtype=array.dtype, shape=array.shape, stype=array.stype)
                item.array_record.items.add(key=key, value=value)
                blobs.append(array.data)
        elif isinstance(record, MetricRecord):
            item.metric_record.CopyFrom(metric_record_to_proto(record))
        else:
            item.config_record.CopyFrom(config_record_to_proto(record))
    return described, blobs


def restore(described: ProtoRecordDict, blobs: Sequence[bytes], *, checked: bool) -> RecordDict:
    """The records that ``describe`` described, with the arrays' bytes again.

    Args:
        described: what is said of them.
        blobs: the arrays' bytes, in order.
        checked: whether arrays are refused that don't say what is in them.

    Raises:
        ValueError: they are no such records.
    """
    count = sum(len(item.array_record.items) for item in described.items)
    if count != len(blobs):
        raise ValueError(f"{count} arrays are described, {len(blobs)} came")
    records, left = RecordDict(), iter(blobs)
    for item in described.items:
        kind = item.WhichOneof("value")
        if kind == "array_record":
            arrays = {}
            for entry in item.array_record.items:
                value, blob = entry.value, next(left)
                array = new_array(value.dtype, tuple(value.shape), value.stype, blob)
                if checked:
                    check_description(entry.key, array, len(blob))
                arrays[entry.key] = array
            records[item.key] = new_record(arrays)
        elif kind == "metric_record":
            records[item.key] = metric_record_from_proto(item.metric_record)
        elif kind == "config_record":
            records[item.key] = config_record_from_proto(item.config_record)
        else:
            raise ValueError(f"{item.key} is a record of no known kind")
    if sum(len(one) for one in records.values() if isinstance(one, ArrayRecord)) != count:
        raise ValueError("two arrays have one name")
    return records


def copied(records: RecordDict) -> RecordDict:
    """The same records once more: what somebody does to these is not seen in those."""
    others = records.copy()
    for name, record in records.items():
        other = record.copy()
        values: dict[str, Any] = other.__dict__["_data"]
        for key, value in values.items():
            if isinstance(value, Array):
                values[key] = new_array(value.dtype, value.shape, value.stype, value.data)
            elif isinstance(value, list):
                values[key] = value.copy()
        others.__dict__["_data"][name] = other
    return others


def check_description(name: str, array: Array, length: int) -> None:
    """Raise ``ValueError`` if an array is described as larger than so many bytes, or as no array."""
    try:
        size = itemsize(array.dtype)
    except Exception as error:  # NumPy parses the text, and fails in many ways
        raise ValueError(f"{name} is of the unknown type {array.dtype!r}") from error
    shape = array.shape
    if len(shape) > MOST_DIMENSIONS or any(extent < 0 for extent in shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, or less than nothing in one")
    # Sizes are counted and reported before anybody looks into the bytes.
    if math.prod(shape) * size > length:
        raise ValueError(f"{name} is described as larger than its {length} bytes")
