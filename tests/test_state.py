"""A client's state directory: whole or not there, and nobody else's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkit import durable
from fedkit.durable import checksum_of, write_json, write_whole
from fedkit.engine import state as state_module
from fedkit.engine.state import FederationState, StateDirectory, first_free
from fedkit.errors import FedkitError
from fedkit.flower import encode_records

OWNER = {"model": "lenet", "shard": 3}


def model(value: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full((4, 3), value, np.float32)), "n": Array(np.array(7))})


def records(value: float, rounds: int = 0) -> RecordDict:
    content = RecordDict({"own-model": model(value), "alone-model": model(-value)})
    content["progress"] = ConfigRecord({"rounds": rounds, "name": "x", "flags": [True, False]})
    content["best"] = MetricRecord({"accuracy": 0.1 + 0.2})
    return content


def opened(folder: Path) -> FederationState:
    return FederationState(folder, OWNER)


def kept(folder: Path) -> tuple[str | None, list[bytes] | None, list[bytes]]:
    """What a process that starts now finds: the key, the reply, the records."""
    state = opened(folder)
    back = RecordDict()
    state.restore(back)
    return state.last_key, state.reply_to(state.last_key or ""), encode_records(back)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its inode: one that is written again gets another."""
    return {p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir()}


def test_a_new_folder_holds_nothing(tmp_path):
    state = opened(tmp_path / "state" / "f")
    assert not state.begun
    assert (state.last_key, state.last_round, state.reply_to("k")) == (None, None, None)
    content = RecordDict()
    state.restore(content)
    assert not content


def test_what_was_committed_is_restored(tmp_path):
    content = records(1.5, 4)
    opened(tmp_path).commit("f/1/train/2/1", [b"the ", b"", b"reply"], content, 1)
    again = opened(tmp_path)
    assert again.begun
    assert (again.last_key, again.last_round) == ("f/1/train/2/1", 1)
    assert again.reply_to("f/1/train/2/1") == [b"the ", b"", b"reply"]
    back = RecordDict()
    again.restore(back)
    assert encode_records(back) == encode_records(content)
    assert list(back) == list(content)


def test_the_last_commit_counts(tmp_path):
    state, content = opened(tmp_path), records(0.0)
    for number in range(1, 5):
        content["own-model"] = model(float(number))
        content.config_records["progress"]["rounds"] = number
        state.commit(f"k{number}", [b"reply %d" % number], content, number)
    assert kept(tmp_path) == ("k4", [b"reply 4"], encode_records(content))


def test_work_goes_on_after_a_restart(tmp_path):
    opened(tmp_path).commit("k1", [b"1"], records(1.0))
    state, content = opened(tmp_path), RecordDict()
    state.restore(content)
    content["own-model"] = model(2.0)
    state.commit("k2", [b"2"], content)
    assert kept(tmp_path) == ("k2", [b"2"], encode_records(content))


def test_joining_writes_nothing_when_nothing_changed(tmp_path):
    state, content = opened(tmp_path), records(1.0)
    state.commit("k1", [b"1"], content)
    before = files(tmp_path)
    state.commit("k2", [b"2"], content)
    assert files(tmp_path) == before


def test_joining_writes_nothing_when_nothing_changed_since_the_restart(tmp_path):
    opened(tmp_path).commit("k1", [b"1"], records(1.0))
    before = files(tmp_path)
    state, content = opened(tmp_path), RecordDict()
    state.restore(content)
    state.commit("k2", [b"2"], content)
    assert files(tmp_path) == before


def test_joining_that_keeps_nothing_writes_nothing(tmp_path):
    opened(tmp_path).commit("k1", [b"1"], RecordDict())
    assert files(tmp_path) == {}


def test_files_of_unchanged_records_are_kept(tmp_path):
    state, content = opened(tmp_path), records(1.0)
    state.commit("k1", [b"1"], content)
    before = files(tmp_path)
    content["own-model"] = model(2.0)
    state.commit("k2", [b"2"], content)
    after = files(tmp_path)
    same = {name for name in before if after.get(name) == before[name]}
    assert {name.partition("-")[2] for name in same} == {
        "alone-model.records",
        "progress.records",
        "best.records",
        "",  # the first reply
    }
    assert kept(tmp_path)[0] == "k2"


@pytest.mark.parametrize("name", ["progress", "best"])
def test_an_edited_small_record_is_noticed(tmp_path, name):
    state, content = opened(tmp_path), records(1.0)
    state.commit("k1", [b"1"], content)
    content[name]["more"] = 1
    state.commit("k2", [b"2"], content)
    assert kept(tmp_path) == ("k2", [b"2"], encode_records(content))


def test_a_value_of_another_type_is_a_change(tmp_path):
    state, content = opened(tmp_path), RecordDict({"c": ConfigRecord({"x": 1})})
    state.commit("k1", [b"1"], content)
    content["c"] = ConfigRecord({"x": True})
    state.commit("k2", [b"2"], content)
    assert kept(tmp_path)[0] == "k2"


def test_a_removed_record_is_gone_after_a_restart(tmp_path):
    state, content = opened(tmp_path), records(1.0)
    state.commit("k1", [b"1"], content)
    del content["best"]
    state.commit("k2", [b"2"], content)
    assert kept(tmp_path) == ("k2", [b"2"], encode_records(content))


def test_old_files_do_not_pile_up(tmp_path):
    state = opened(tmp_path)
    for number in range(1, 6):
        state.commit(f"k{number}", [b"reply"], records(float(number), number), number)
    assert len(files(tmp_path)) == 4 + 2 + 1  # the records, the replies of two rounds, the manifest


def test_the_replies_of_the_last_two_rounds_are_told_again_after_a_restart(tmp_path):
    """A server goes on from its last checkpoint, or from the one before it."""
    state, content = opened(tmp_path), records(1.0)
    done = [(f"f/{at}/{kind}", at) for at in (1, 2, 3) for kind in ("local", "evaluate")]
    for key, at in done:
        state.commit(key, [key.encode()], content, at)
    for one in (state, opened(tmp_path)):
        replies = {key: one.reply_to(key) for key, _ in done}
        assert replies == {key: [key.encode()] if at > 1 else None for key, at in done}
        assert (one.last_key, one.last_round) == ("f/3/evaluate", 3)
    assert len([name for name in files(tmp_path) if name.endswith(".reply")]) == 4


def test_an_answer_that_changes_nothing_is_kept_all_the_same(tmp_path):
    """Measuring changes no model; a repeated round asks for it again nevertheless."""
    state, content = opened(tmp_path), records(1.0)
    state.commit("k1", [b"1"], content, 1)
    state.commit("k2", [b"2"], content, 1)
    assert opened(tmp_path).reply_to("k2") == [b"2"]


def test_a_round_that_is_repeated_keeps_the_replies_after_it(tmp_path):
    """The server went back by one round; what the client did after that may be asked again, too."""
    state, content = opened(tmp_path), records(1.0)
    for at in (1, 2, 3):
        state.commit(f"k{at}", [b"%d" % at], content, at)
    state.commit("k2", [b"again"], content, 2)
    assert [opened(tmp_path).reply_to(f"k{at}") for at in (1, 2, 3)] == [None, [b"again"], [b"3"]]


def test_joining_anew_costs_none_of_the_kept_replies(tmp_path):
    state = opened(tmp_path)
    state.commit("k1", [b"1"], records(1.0), 1)
    state.commit("k2", [b"2"], records(2.0), 2)
    state.commit("join", [b"joined"], records(3.0), 0)
    assert [opened(tmp_path).reply_to(key) for key in ("k1", "k2")] == [[b"1"], [b"2"]]


@pytest.mark.parametrize(
    "name", ["a/b", "../up", "/", ".", "with space", "ü", "%2F", "a%2Fb"], ids=repr
)
def test_any_name_of_a_record_is_kept_within_the_folder(tmp_path, name):
    folder = tmp_path / "f"
    content = RecordDict({name: model(1.0), "other": model(2.0)})
    opened(folder).commit("k", [b"1"], content, 1)
    assert kept(folder)[2] == encode_records(content)
    assert list(tmp_path.iterdir()) == [folder]
    assert all(entry.is_file() for entry in folder.iterdir())
    state, again = opened(folder), RecordDict()
    state.restore(again)
    again[name] = model(3.0)
    state.commit("k2", [b"2"], again, 2)
    assert kept(folder)[2] == encode_records(again)


def test_names_that_look_alike_on_disk_are_told_apart(tmp_path):
    content = RecordDict({"a/b": model(1.0), "a%2Fb": model(2.0), "a_b": model(3.0)})
    opened(tmp_path).commit("k", [b"1"], content, 1)
    assert kept(tmp_path)[2] == encode_records(content)


def test_a_folder_of_another_owner_is_refused(tmp_path):
    opened(tmp_path).commit("k1", [b"1"], records(1.0))
    before = files(tmp_path)
    with pytest.raises(FedkitError, match=r"lenet on shard 3.*cnn on shard 3.*--state-dir"):
        FederationState(tmp_path, {"model": "cnn", "shard": 3})
    with pytest.raises(FedkitError, match=r"lenet on shard 3.*lenet on shard 4"):
        FederationState(tmp_path, {"model": "lenet", "shard": 4})
    assert files(tmp_path) == before


def test_a_state_of_another_version_is_refused(tmp_path):
    opened(tmp_path).commit("k1", [b"1"], records(1.0))
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(FedkitError, match="another version"):
        opened(tmp_path)


# Killed at any instant.


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def commit_killed_after(
    monkeypatch: pytest.MonkeyPatch, folder: Path, content: RecordDict, writes: int, *, rest: str
) -> bool:
    """Commit in a process that is killed after so many whole files; True if it was."""
    left = writes

    def write(path: Path, buffers: Iterable[bytes]) -> None:
        nonlocal left
        if left == 0:
            # What a kill leaves behind: nothing, or a part of the next file.
            if rest == "half":
                path.with_name(f".{path.name}.unfinished").write_bytes(b"".join(buffers)[:20])
            raise Killed
        left -= 1
        write_whole(path, buffers)

    state, before = opened(folder), RecordDict()
    state.restore(before)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "write_whole", write)
        patch.setattr(durable, "write_whole", write)
        try:
            state.commit("new", [b"new reply"], content)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("rest", ["nothing", "half"])
def test_a_kill_at_any_instant_leaves_the_old_state_or_the_new(tmp_path, monkeypatch, rest):
    new = records(2.0, 2)
    del new["best"]
    seen = []
    for writes in range(100):
        folder = tmp_path / str(writes)
        opened(folder).commit("old", [b"old reply"], records(1.0, 1))
        killed = commit_killed_after(monkeypatch, folder, new, writes, rest=rest)
        found = kept(folder)
        if found[0] == "old":
            assert found == ("old", [b"old reply"], encode_records(records(1.0, 1)))
        else:
            assert found == ("new", [b"new reply"], encode_records(new))
        seen.append(found[0])
        # What was left behind is in nobody's way.
        state, content = opened(folder), RecordDict()
        state.restore(content)
        content["own-model"] = model(3.0)
        state.commit("next", [b"next reply"], content)
        assert kept(folder) == ("next", [b"next reply"], encode_records(content))
        if not killed:
            break
    # Three records, the reply and the manifest; only with the last of them it counts.
    assert seen == ["old"] * 5 + ["new"]


def test_a_first_commit_that_was_killed_never_was(tmp_path, monkeypatch):
    assert commit_killed_after(monkeypatch, tmp_path, records(1.0), 3, rest="half")
    assert not opened(tmp_path).begun


def test_a_kill_before_the_old_files_are_removed_leaves_the_new_state(tmp_path, monkeypatch):
    state, content = opened(tmp_path), records(1.0)
    state.commit("old", [b"old"], content)
    content["own-model"] = model(2.0)

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            state.commit("new", [b"new"], content)
    assert kept(tmp_path) == ("new", [b"new"], encode_records(content))


def test_a_full_disk_is_a_sentence_and_the_old_state_still_counts(tmp_path, monkeypatch):
    state, content = opened(tmp_path), records(1.0)
    state.commit("old", [b"old"], content)
    before = files(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    content["own-model"] = model(2.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FedkitError, match="No space left"):
            state.commit("new", [b"new"], content)
    assert files(tmp_path) == before
    state.commit("new", [b"new"], content)
    assert kept(tmp_path) == ("new", [b"new"], encode_records(content))


@pytest.mark.parametrize("before", ["old", None])
def test_write_whole_leaves_the_old_file_or_the_new(tmp_path, before):
    file = tmp_path / "file"
    if before is not None:
        file.write_text(before)

    def buffers() -> Iterable[bytes]:
        yield b"half of "
        raise OSError(28, "No space left on device")

    with pytest.raises(FedkitError, match=r"file can't be written.*No space"):
        write_whole(file, buffers())
    assert sorted(tmp_path.iterdir()) == ([file] if before else [])
    assert (file.read_text() if before else None) == before
    write_whole(file, [b"new", b" text"])
    assert file.read_bytes() == b"new text"
    assert list(tmp_path.iterdir()) == [file]


def test_writing_into_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(FedkitError, match="can't be written"):
        write_json(tmp_path / "none" / "file", {})


# Damage.


@pytest.mark.parametrize("ending", [".records", ".reply"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_byte_is_noticed(tmp_path, ending, where):
    opened(tmp_path).commit("k", [b"the reply"], records(1.0))
    file = next(p for p in sorted(tmp_path.iterdir()) if p.suffix == ending)
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(FedkitError, match="damaged"):
        kept(tmp_path)


@pytest.mark.parametrize("ending", [".records", ".reply"])
def test_a_missing_or_cut_file_is_noticed(tmp_path, ending):
    opened(tmp_path).commit("k", [b"the reply"], records(1.0))
    file = next(p for p in sorted(tmp_path.iterdir()) if p.suffix == ending)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FedkitError, match="damaged"):
        kept(tmp_path)
    file.unlink()
    with pytest.raises(FedkitError, match="can't be read"):
        kept(tmp_path)


def test_a_manifest_with_any_byte_flipped_is_refused_in_a_sentence(tmp_path):
    opened(tmp_path).commit("k", [b"the reply"], records(1.0), 1)
    file = tmp_path / "manifest.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        try:
            kept(tmp_path)
        except FedkitError:
            continue
        pytest.fail(f"byte {at} ({whole[max(0, at - 9) : at + 9]!r}) was not missed")


@pytest.mark.parametrize("field", ["commit", "key", "replies", "records", "sha256"])
def test_a_manifest_that_was_edited_is_refused(tmp_path, field):
    opened(tmp_path).commit("k", [b"the reply"], records(1.0), 1)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    other = {"commit": 7, "key": "other"}.get(field, {})
    file.write_text(json.dumps({**manifest, field: other}))
    with pytest.raises(FedkitError, match="checksum"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"version": 1}'],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    opened(tmp_path).commit("k", [b"the reply"], records(1.0))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(FedkitError, match=r"manifest.json"):
        opened(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = tmp_path / "f"
    opened(folder).commit("k", [b"the reply"], records(1.0), 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["checksum"]
    manifest["replies"]["k"][0] = "../secret"
    manifest["sha256"]["../secret"] = hashlib.sha256(b"secret").hexdigest()
    manifest["checksum"] = checksum_of(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(FedkitError, match="can't be read"):
        opened(folder).reply_to("k")


# The directory and who owns it.


def test_the_identity_is_drawn_once_and_lasts(tmp_path):
    first = StateDirectory(tmp_path)
    identity = first.identity()
    assert set(identity) == {"identity", "secret"}
    assert len(identity["secret"]) >= 32
    assert first.identity() == identity
    first.close()
    second = StateDirectory(tmp_path)
    assert second.identity() == identity
    second.close()


def test_devices_have_different_identities(tmp_path):
    one, other = StateDirectory(tmp_path / "a"), StateDirectory(tmp_path / "b")
    assert one.identity()["identity"] != other.identity()["identity"]
    assert one.identity()["secret"] != other.identity()["secret"]
    one.close()
    other.close()


def test_the_identity_is_readable_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        directory = StateDirectory(tmp_path)
        directory.identity()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.json").stat().st_mode) == 0o600
    directory.close()


def test_the_identity_is_never_readable_for_others_not_even_for_an_instant(tmp_path, monkeypatch):
    modes = []
    replace = Path.replace

    def watched(self: Path, target: Any) -> Any:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    directory = StateDirectory(tmp_path)
    directory.identity()
    directory.close()
    assert modes == [0o600]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": "a"}', '{"identity": 3}'])
def test_a_damaged_identity_is_a_sentence(tmp_path, text):
    (tmp_path / "identity.json").write_text(text)
    directory = StateDirectory(tmp_path)
    with pytest.raises(FedkitError, match=r"identity.json"):
        directory.identity()
    directory.close()


def test_a_directory_in_use_is_refused(tmp_path):
    first = StateDirectory(tmp_path)
    with pytest.raises(FedkitError, match=r"Another client uses.*--state-dir"):
        StateDirectory(tmp_path)
    first.close()
    StateDirectory(tmp_path).close()


def test_set_aside_moves_the_federations_and_keeps_the_device(tmp_path):
    directory = StateDirectory(tmp_path)
    identity = directory.identity()
    assert directory.set_aside() is None
    for name in ("f1", "f2"):
        opened(tmp_path / name).commit("k", [name.encode()], records(1.0), 1)
    (tmp_path / "notes").mkdir()
    aside = directory.set_aside()
    assert aside is not None and aside.parent == tmp_path
    assert sorted(entry.name for entry in aside.iterdir()) == ["f1", "f2"]
    assert kept(aside / "f2") == ("k", [b"f2"], encode_records(records(1.0)))
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry != aside) == [
        "identity.json",
        "lock",
        "notes",
    ]
    assert directory.identity() == identity
    # Another model may begin now where the old one was; a second time nothing is overwritten.
    FederationState(tmp_path / "f1", {"model": "cnn", "shard": 0}).commit("k", [], records(2.0), 1)
    again = directory.set_aside()
    assert again is not None and again != aside
    assert kept(aside / "f1")[1] == [b"f1"]
    assert directory.set_aside() is None
    directory.close()


HOLD = """
import sys
from pathlib import Path
from fedkit.engine.state import StateDirectory
held = StateDirectory(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_lets_go_of_its_directory(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FedkitError, match="Another client uses"):
            StateDirectory(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait(30)
        StateDirectory(tmp_path).close()


def test_first_free_takes_the_first_directory_nobody_uses(tmp_path):
    held = [first_free(tmp_path, "client") for _ in range(3)]
    assert [one.path.name for one in held] == ["client-0", "client-1", "client-2"]
    held[1].close()
    again = first_free(tmp_path, "client")
    assert again.path.name == "client-1"
    for one in (held[0], held[2], again):
        one.close()


def no_folder(path: Path) -> None:
    path.write_text("a file")


def no_lock(path: Path) -> None:
    (path / "lock").mkdir(parents=True)


@pytest.mark.parametrize("spoil", [no_folder, no_lock])
def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path, spoil: Callable[[Path], None]):
    spoil(tmp_path / "state")
    with pytest.raises(FedkitError, match="state"):
        StateDirectory(tmp_path / "state")


def test_first_free_gives_up_at_once_where_nothing_can_be_written(tmp_path, monkeypatch):
    tried = []
    make_folder = state_module.make_folder

    def watched(folder: Path) -> None:
        tried.append(folder)
        make_folder(folder)

    monkeypatch.setattr(state_module, "make_folder", watched)
    no_folder(tmp_path / "parent")
    with pytest.raises(FedkitError, match="parent"):
        first_free(tmp_path / "parent", "client")
    assert len(tried) == 1
