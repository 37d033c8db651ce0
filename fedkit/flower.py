"""With ``flower_records`` the one place that touches Flower's internals: an upgrade breaks here.

Flower's own protobuf describes a message; the arrays' bytes, which are encoded already, travel beside
it and are copied neither into the protobuf nor out of it (44 MB through ``message_to_proto`` alone
costs 0.3 s). The same form serves the wire and the client's state on disk. Nothing is pickled.
"""

from __future__ import annotations

import copy
import math
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from flwr.app import ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import error_from_proto, metadata_from_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkit.errors import FedkitError
from fedkit.flower_records import check_description, describe, itemsize, restore

SERVER_NODE_ID = 1
_COUNT = struct.Struct(">I")
Buffers = list[bytes]
Scalar = bool | int | float | str


class NoSuchAttribute(Exception):
    """A component that an app's ``pyproject.toml`` names is not there."""


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
    # A file's name in it may be no UTF-8, of which protobuf takes nothing.
    text = reason.encode(errors="replace").decode()
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=message)


def is_failure(reply: Message) -> bool:
    """Whether the client's own code failed, and not the way to it."""
    return reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def unavailable_reply(message: Message, reason: str) -> Message:
    """The reply that stands for a client that is gone."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)


def app_error_reply(message: Message, error: BaseException) -> Message:
    """The reply of a client whose ``ClientApp`` raised that, as Flower's own node words it."""
    return error_reply(message, f"{type(error)}:<'{error}'>")


def expired_reply(message: Message) -> Message:
    """The reply to a message that had none when its time to live was over."""
    reason = "Its time to live was over before a reply came."
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, reason), reply_to=message)


def unknown_reply(message_id: str, run_id: int) -> Message:
    """What is pulled under an id that names no message, or one whose reply was pulled before."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SERVER_NODE_ID,
        dst_node_id=SERVER_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    reason = "There is no such message, or its reply was pulled before."
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))


def envelope_of(message: Message) -> Message:
    """The same message without its content, to be kept while the content may be edited or freed."""
    return make_message(copy.copy(message.metadata), content=RecordDict())


def encode_message(message: Message) -> Buffers:
    """A message as buffers: its description, then the bytes of each array, which are not copied."""
    if not message.has_content():
        return [message_to_proto(message).SerializeToString()]
    described, *blobs = encode_content(message.content)
    return [encode_envelope(message) + described, *blobs]


def encode_content(content: RecordDict) -> Buffers:
    """The part of a message's buffers that does not hang on who gets it: made once for a broadcast."""
    described, blobs = describe(content)
    return [ProtoMessage(content=described).SerializeToString(), *blobs]


def parts_of(content: RecordDict) -> dict[str, Any]:
    """What tells whether a content is still what it was: a strategy may edit what it sends to many."""
    return {
        name: (dict(record), list(map(type, record.values()))) for name, record in content.items()
    }


def encode_envelope(message: Message) -> bytes:
    """The other part; protobuf reads two descriptions, one behind the other, as one."""
    return ProtoMessage(metadata=metadata_to_proto(message.metadata)).SerializeToString()


def decode_message(buffers: Sequence[bytes], *, described: bool = True) -> Message:
    """The message that ``encode_message`` wrote.

    Args:
        buffers: what came.
        described: whether arrays are refused that don't say what is in them. Flower's older apps send
            such, and an app may have a form of its own.

    Raises:
        ValueError: the buffers are no such message.
    """
    if not buffers:
        raise ValueError("an empty message")
    head, *blobs = buffers
    try:
        proto = ProtoMessage.FromString(head)
        metadata = metadata_from_proto(proto.metadata)
        failed = error_from_proto(proto.error) if proto.HasField("error") else None
        content = None
        if proto.HasField("content"):
            content = restore(proto.content, blobs, checked=described)
        elif blobs:
            raise ValueError("it carries arrays and has no content")
        return make_message(metadata, content, failed)
    except Exception as error:  # protobuf and Flower raise many kinds for foreign bytes
        raise ValueError(f"not a Flower message: {error}") from error


def decode_content(buffers: Sequence[bytes]) -> RecordDict:
    """The content that ``encode_content`` wrote.

    Raises:
        ValueError: an array is described as larger than its bytes, or as no array.
    """
    described, *blobs = buffers
    return restore(ProtoMessage.FromString(described).content, blobs, checked=True)


def decode_envelope(head: bytes, content: RecordDict) -> Message:
    """The message that ``encode_envelope`` wrote, with its content, which was read before."""
    return make_message(metadata_from_proto(ProtoMessage.FromString(head).metadata), content)


def encode_records(records: RecordDict) -> Buffers:
    """Records without a message, as kept on disk."""
    described, blobs = describe(records)
    return as_file([described.SerializeToString(), *blobs])


def decode_records(data: bytes | bytearray | memoryview) -> RecordDict:
    """The records that ``encode_records`` wrote; ``ValueError`` if the bytes are none."""
    head, *blobs = from_file(data)
    try:
        return restore(ProtoRecordDict.FromString(head), blobs, checked=False)
    except Exception as error:
        raise ValueError(f"not Flower records: {error}") from error


def payload_bytes(message: Message) -> int:
    """Bytes of the tensors in a message, whatever carries them: equal on every engine."""
    if not message.has_content():
        return 0
    return sum(
        math.prod(array.shape) * itemsize(array.dtype)
        for record in message.content.values()
        if isinstance(record, ArrayRecord)
        for array in record.values()
    )


def check_arrays(records: RecordDict) -> None:
    """Raise ``ValueError`` if an array of a reply is described as larger than its bytes, or as no array."""
    for record in records.array_records.values():
        for name, array in record.items():
            check_description(name, array, len(array.data))


@contextmanager
def asking_superlink() -> Iterator[None]:
    """What Flower's own grid raises where its SuperLink does not answer as hoped, in a sentence.

    Raises:
        FedkitError: the run was stopped, or the SuperLink is gone.
    """
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status == httpx.codes.UNAUTHORIZED:
            raise FedkitError("The SuperLink has ended this run: it was stopped.") from error
        raise FedkitError(f"The SuperLink refused a request with status {status}.") from error
    except httpx.HTTPError as error:
        raise FedkitError(f"The SuperLink can't be reached: {error}.") from error


def new_context(
    node_id: int,
    node_config: Mapping[str, Scalar],
    run_config: Mapping[str, Scalar] = {},
    run_id: int = 1,
) -> Context:
    """An empty context, as Flower would make one for a new node."""
    return Context(run_id, node_id, dict(node_config), RecordDict(), dict(run_config))


def describe_run(run_id: int, fab_id: str = "", fab_version: str = "") -> Run:
    """Flower's description of a run, and of the app that it runs if it runs one."""
    run = Run.create_empty(run_id)
    run.fab_id, run.fab_version = fab_id, fab_version
    return run


def read_project(folder: Path) -> dict[str, Any]:
    """The ``pyproject.toml`` of a Flower App.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it describes no Flower App; what is missing follows, a line each.
    """
    return get_project_config(folder)


def read_config(texts: Sequence[str]) -> dict[str, Scalar]:
    """``["key=1 other='word'"]``, or one name of a TOML file, as Flower's command line takes them.

    Raises:
        Exception: many kinds, for what can't be read.
    """
    return parse_config_args(list(texts))


def run_config_of(project: Mapping[str, Any], overrides: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """An app's own configuration with ``overrides``; nested tables become names with dots.

    Raises:
        ValueError: an override that the app's configuration does not have, or a value of no plain kind.
    """
    own = flatten_dict(project["tool"]["flwr"]["app"].get("config", {}))
    return fuse_dicts(own, dict(overrides))


def load_component(reference: str, folder: Path) -> Any:
    """What ``module:attribute`` names, with ``folder`` on the path from now on.

    Raises:
        NoSuchAttribute: it is no such reference, or the module has no such attribute.
        Exception: whatever importing the module raises.
    """
    return load_app(reference, NoSuchAttribute, folder)


def as_file(buffers: Sequence[bytes]) -> Buffers:
    """The same buffers, with their lengths in front, to be written one after the other."""
    lengths = struct.pack(f">{len(buffers)}Q", *map(len, buffers))
    return [_COUNT.pack(len(buffers)) + lengths, *buffers]


def from_file(data: bytes | bytearray | memoryview) -> Buffers:
    """The buffers that ``as_file`` wrote.

    Raises:
        ValueError: the data are cut short, or no such file.
    """
    view = memoryview(data)
    try:
        (count,) = _COUNT.unpack_from(view)
        lengths = cast(tuple[int, ...], struct.unpack_from(f">{count}Q", view, _COUNT.size))
    except (struct.error, MemoryError) as error:
        raise ValueError("the data are cut short") from error
    start = _COUNT.size + 8 * count
    if not count or start + sum(lengths) != len(view):
        raise ValueError(f"the data say that they have other lengths than their {len(view)} bytes")
    buffers = []
    for length in lengths:
        buffers.append(bytes(view[start : start + length]))
        start += length
    return buffers
