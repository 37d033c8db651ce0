"""The one place that touches Flower's internals, so that an upgrade breaks in one known place.

Flower's own protobuf describes a message; the arrays' bytes, which are encoded already, travel beside
it and are copied neither into the protobuf nor out of it (44 MB through ``message_to_proto`` alone
costs 0.3 s). The same form serves the wire and the client's state on disk. Nothing is pickled.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from typing import cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
_COUNTS = struct.Struct(">II")
Buffers = list[bytes]


def take_identity(node_id: int = SERVER_NODE_ID, run_id: int = 1) -> None:
    """Tell Flower who this process is; its ``Message`` constructor reads it. One a process."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = node_id


def set_message_id(message: Message, message_id: str) -> None:
    """Give an instruction its id (on Flower's own engine the SuperLink does)."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, reason: str) -> Message:
    """The reply of a client whose own code failed."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def unavailable_reply(message: Message, reason: str) -> Message:
    """The reply that stands for a client that is gone."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)


def encode_message(message: Message) -> Buffers:
    """A message as buffers to be sent one after the other; arrays are not copied."""
    if not message.has_content():
        return _frame(message_to_proto(message).SerializeToString(), [])
    skeleton, blobs = _strip(message.content)
    proto = message_to_proto(make_message(message.metadata, content=skeleton))
    return _frame(proto.SerializeToString(), blobs)


def decode_message(data: bytes | bytearray | memoryview) -> Message:
    """The message that ``encode_message`` wrote.

    Raises:
        ValueError: the bytes are no such message.
    """
    head, blobs = _unframe(data)
    try:
        message = message_from_proto(ProtoMessage.FromString(head))
    except Exception as error:  # protobuf and Flower raise many kinds for foreign bytes
        raise ValueError(f"not a Flower message: {error}") from error
    if message.has_content():
        _fill(message.content, blobs)
    elif blobs:
        raise ValueError("a message without content carries arrays")
    return message


def encode_records(records: RecordDict) -> Buffers:
    """Records without a message, as kept on disk."""
    skeleton, blobs = _strip(records)
    return _frame(recorddict_to_proto(skeleton).SerializeToString(), blobs)


def decode_records(data: bytes | bytearray | memoryview) -> RecordDict:
    """The records that ``encode_records`` wrote; ``ValueError`` if the bytes are none."""
    head, blobs = _unframe(data)
    try:
        records = recorddict_from_proto(ProtoRecordDict.FromString(head))
    except Exception as error:
        raise ValueError(f"not Flower records: {error}") from error
    _fill(records, blobs)
    return records


def payload_bytes(message: Message) -> int:
    """Bytes of the tensors in a message, whatever carries them: equal on every engine."""
    if not message.has_content():
        return 0
    return sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for record in message.content.array_records.values()
        for array in record.values()
    )


def new_context(node_id: int, node_config: dict[str, bool | int | float | str]) -> Context:
    """An empty client context, as Flower would make one for a new node."""
    return Context(
        run_id=1, node_id=node_id, node_config=node_config, state=RecordDict(), run_config={}
    )


def _strip(records: RecordDict) -> tuple[RecordDict, list[bytes]]:
    skeleton, blobs = RecordDict(), []
    for name, record in records.items():
        if not isinstance(record, ArrayRecord):
            skeleton[name] = record
            continue
        bare = ArrayRecord()
        for array_name, array in record.items():
            bare[array_name] = Array(array.dtype, array.shape, array.stype, b"")
            blobs.append(array.data)
        skeleton[name] = bare
    return skeleton, blobs


def _fill(records: RecordDict, blobs: Sequence[bytes]) -> None:
    arrays = [
        (record, name)
        for record in records.values()
        if isinstance(record, ArrayRecord)
        for name in record
    ]
    if len(arrays) != len(blobs):
        raise ValueError(f"{len(arrays)} arrays are described, {len(blobs)} came")
    for (record, name), blob in zip(arrays, blobs, strict=True):
        bare = record[name]
        _check_description(name, bare)
        record[name] = Array(bare.dtype, tuple(bare.shape), bare.stype, blob)


def _check_description(name: str, array: Array) -> None:
    try:
        np.dtype(array.dtype)
    except Exception as error:  # NumPy parses the text, and fails in many ways
        raise ValueError(f"{name} is of the unknown type {array.dtype!r}") from error
    if any(length < 0 for length in array.shape):
        raise ValueError(f"{name} has the shape {tuple(array.shape)}")


def _frame(head: bytes, blobs: list[bytes]) -> Buffers:
    lengths = struct.pack(f">{len(blobs)}Q", *(len(blob) for blob in blobs))
    return [_COUNTS.pack(len(head), len(blobs)) + lengths + head, *blobs]


def _unframe(data: bytes | bytearray | memoryview) -> tuple[bytes, list[bytes]]:
    view = memoryview(data)
    try:
        head_length, count = _COUNTS.unpack_from(view)
        lengths = cast(tuple[int, ...], struct.unpack_from(f">{count}Q", view, _COUNTS.size))
    except (struct.error, MemoryError) as error:
        raise ValueError("the message is cut short") from error
    start = _COUNTS.size + 8 * count
    if start + head_length + sum(lengths) != len(view):
        raise ValueError(f"the message says it has other lengths than its {len(view)} bytes")
    head = bytes(view[start : start + head_length])
    blobs, start = [], start + head_length
    for length in lengths:
        blobs.append(bytes(view[start : start + length]))
        start += length
    return head, blobs
