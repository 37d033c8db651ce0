"""Checkpoints: what was saved is read back to the bit, and what is torn is passed over."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedkit import durable
from fedkit.durable import checksum_of, write_whole
from fedkit.engine import checkpoint as checkpoint_module
from fedkit.engine import strategy_state
from fedkit.engine.checkpoint import Checkpoint, Checkpoints, Progress
from fedkit.engine.roster import Member
from fedkit.errors import FedkitError

MEMBERS = (
    Member(2, 1, "client 1 (lenet)", "lenet", 500, 61_706, "cpu", ("float32", "topk")),
    Member(3, 0, "client 0 (cnn)", "cnn", 400, 1_000, "cuda:0", ()),
)


@dataclass
class State:
    """A strategy's."""

    matrix: Any = field(default_factory=lambda: np.eye(2))
    names: list[str] = field(default_factory=list)


def progress(round: int) -> Progress:
    return Progress(round, f"digest {round}", 1.5 * round, 100 * round, 50 * round, MEMBERS, (2, 3))


def arrays(value: float) -> ArrayRecord:
    """In an order that is no alphabet's, and of several types."""
    return ArrayRecord(
        {
            "w": Array(np.full((2, 3), value, np.float32)),
            "b": Array(np.array([value % 100, np.nan], np.float16)),
            "a/count": Array(np.array(7, np.int64)),
            "flags": Array(np.array([True, False])),
            "empty": Array(np.zeros((0, 4))),
        }
    )


def save(run: Path, round: int, keep: int = 3) -> None:
    state = State(np.full((2, 2), float(round)), [f"round {round}"])
    Checkpoints(run, keep).save(progress(round), state, arrays(float(round)))


def rounds(run: Path) -> list[int]:
    """Those that can be read, the newest first."""
    return [found.progress.round for found in Checkpoints(run).newest()]


def newest(run: Path) -> Checkpoint:
    return next(Checkpoints(run).newest())


def bits(record: ArrayRecord) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [
        (name, str(array.numpy().dtype), array.numpy().shape, array.numpy().tobytes())
        for name, array in record.items()
    ]


def assert_whole(found: Checkpoint, round: int) -> None:
    assert found.progress == progress(round)
    assert bits(found.arrays) == bits(arrays(float(round)))
    state = found.strategy_state(State)
    assert state.names == [f"round {round}"] and (state.matrix == round).all()


def test_there_are_none_in_a_new_run(tmp_path):
    assert list(Checkpoints(tmp_path).newest()) == []


def test_what_was_saved_is_read_back(tmp_path):
    save(tmp_path, 3)
    assert_whole(newest(tmp_path), 3)


def test_a_strategy_without_state_or_model_has_checkpoints_too(tmp_path):
    Checkpoints(tmp_path).save(replace(progress(0), members=(), present=()), None, ArrayRecord())
    found = newest(tmp_path)
    assert found.progress.members == () and list(found.arrays) == []
    with pytest.raises(FedkitError):
        found.strategy_state(State)


def test_another_strategys_state_is_refused(tmp_path):
    @dataclass
    class Other:
        x: int = 1

    save(tmp_path, 1)
    with pytest.raises(FedkitError, match="holds State"):
        newest(tmp_path).strategy_state(Other)


def test_the_last_ones_are_kept_the_newest_first(tmp_path):
    for round in range(12):
        save(tmp_path, round, keep=3)
    assert rounds(tmp_path) == [11, 10, 9]
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "000009",
        "000010",
        "000011",
    ]


def test_rounds_are_numbers_not_words(tmp_path):
    for round in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, round, keep=2)
    assert rounds(tmp_path) == [1_000_001, 1_000_000]


def test_a_round_that_is_saved_again_takes_the_place_of_the_first(tmp_path):
    """Passed over as damaged, it was run again."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "000002" / "checkpoint.json").write_text("{")
    assert rounds(tmp_path) == [1]
    save(tmp_path, 2)
    assert_whole(newest(tmp_path), 2)


def test_folders_of_others_are_left_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "notes").mkdir()
    save(tmp_path, 2, keep=1)
    assert rounds(tmp_path) == [2]
    assert (tmp_path / "checkpoints" / "notes").is_dir()


# Damage.

FILES = ("checkpoint.json", "arrays.safetensors", "strategy.safetensors")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def gone(file: Path) -> None:
    file.unlink()


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [cut, emptied, gone, a_folder])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path, caplog, name, spoil: Callable[[Path], None]
):
    for round in (1, 2):
        save(tmp_path, round)
    spoil(tmp_path / "checkpoints" / "000002" / name)
    with caplog.at_level(logging.WARNING):
        assert_whole(newest(tmp_path), 1)
    assert "000002 is damaged" in caplog.text and "000001" not in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_any_byte_flipped_is_passed_over(tmp_path, name, caplog):
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "000001" / name
    whole = file.read_bytes()
    for at in range(0, len(whole) - 1, 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        assert rounds(tmp_path) == [], f"byte {at} ({whole[max(0, at - 9) : at + 9]!r})"
    file.write_bytes(whole)
    assert rounds(tmp_path) == [1]


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"x"', "{}", '{"schema": 1}', "[" * 100, "\xff"]
)
def test_a_description_that_is_none_is_passed_over(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "000001" / "checkpoint.json").write_text(text, "latin-1")
    assert rounds(tmp_path) == []


def rewrite(run: Path, **changes: Any) -> None:
    """Another program's description, whole in itself."""
    file = run / "checkpoints" / "000001" / "checkpoint.json"
    about = {**json.loads(file.read_text()), **changes}
    about.pop("checksum")
    file.write_text(json.dumps({**about, "checksum": checksum_of(about)}))


@pytest.mark.parametrize(
    "changes",
    [{"schema": 99}, {"sha256": []}, {"names": ["w", "x"]}, {"members": [1]}],
    ids=str,
)
def test_a_description_of_another_kind_is_passed_over(tmp_path, changes):
    save(tmp_path, 1)
    rewrite(tmp_path)
    assert rounds(tmp_path) == [1]
    rewrite(tmp_path, **changes)
    assert rounds(tmp_path) == []


def test_a_description_cannot_name_files_elsewhere(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "secret").write_text("secret")
    rewrite(tmp_path, sha256={"../../secret": "0"})
    assert rounds(tmp_path) == []


# Killed, or out of room, at any instant.


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


@pytest.mark.parametrize("rest", ["nothing", "half"])
def test_a_kill_at_any_instant_leaves_the_last_one_or_the_new(tmp_path, monkeypatch, rest):
    """Between any two files, before and after the renaming, and while old ones are removed."""
    seen, rename, rmtree = [], Path.rename, shutil.rmtree
    for steps in range(100):
        run, left = tmp_path / str(steps), steps
        save(run, 1)
        save(run, 2, keep=2)

        def step() -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1

        def write(path: Path, buffers: Iterable[bytes], **more: Any) -> None:
            try:
                step()
            except Killed:
                if rest == "half":
                    path.with_name(f".{path.name}.unfinished").write_bytes(b"half of it")
                raise
            write_whole(path, buffers, **more)

        def renamed(self: Path, target: Path) -> Path:
            step()
            return rename(self, target)

        def removed(path: Path, ignore_errors: bool = False) -> None:
            if Path(path).exists():
                step()
                if rest == "half":
                    next(iter(sorted(Path(path).iterdir()))).unlink()
                    step()
            rmtree(path, ignore_errors=ignore_errors)

        killed = False
        with monkeypatch.context() as patch:
            for module in (checkpoint_module, strategy_state, durable):
                patch.setattr(module, "write_whole", write)
            patch.setattr(Path, "rename", renamed)
            patch.setattr(shutil, "rmtree", removed)
            try:
                save(run, 3, keep=2)
            except Killed:
                killed = True
        found = list(Checkpoints(run).newest())
        assert len(found) >= 2
        assert_whole(found[0], found[0].progress.round)
        seen.append(found[0].progress.round)
        # What was left behind is in nobody's way.
        save(run, 3, keep=2)
        assert rounds(run)[:2] == [3, 2]
        assert_whole(newest(run), 3)
        if not killed:
            break
    # Strategy, arrays, description and the renaming; only with the last of them it counts.
    assert seen[:5] == [2, 2, 2, 2, 3] and set(seen[4:]) == {3}
    assert len(seen) == (7 if rest == "half" else 6)


def test_a_full_disk_is_a_sentence_and_the_earlier_one_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FedkitError, match=r"can't be written: No space left"):
            save(tmp_path, 2, keep=1)
    assert rounds(tmp_path) == [1]
    save(tmp_path, 2, keep=1)
    assert rounds(tmp_path) == [2]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FedkitError, match="checkpoints"):
        save(tmp_path, 1)
