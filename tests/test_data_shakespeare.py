"""Shakespeare: windows within what one speaker says, and LEAF's files as LEAF writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.data.datasets import open_dataset
from fedkit.data.shakespeare import LEAF_LETTERS
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

ROOT = os.environ.get("FEDKIT_DATA_ROOT", "")


def write(root, text, name="play.txt"):
    (root / "shakespeare").mkdir(exist_ok=True)
    (root / "shakespeare" / name).write_text(text, encoding="utf-8")


def opened(root, spec="shakespeare"):
    return open_dataset(spec, DataSettings(str(root)))


def strings(data, pool):
    """Window, next character and owner of every sample."""
    samples = pool.all()
    windows = ["".join(data.classes[token] for token in row) for row in samples.data.tolist()]
    following = [data.classes[label] for label in samples.labels.tolist()]
    return list(zip(windows, following, pool.owners.tolist(), strict=True))


def slow(said, stride):
    """The same by hand: the speakers in order, each a list of (window, next, owner)."""
    train, test = [], []
    owner = 0
    for _, speech in sorted(said.items()):
        cut = int(0.8 * len(speech))
        if cut < 81:
            continue
        for part, into in ((speech[:cut], train), (speech[cut:], test)):
            for start in range(0, len(part) - 80, stride):
                into.append((part[start : start + 80], part[start + 80], owner))
        owner += 1
    return train, test


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 300)), min_size=1, max_size=6),
    st.integers(1, 90),
)
def test_windows_are_cut_within_a_speaker_and_never_across_the_cut(
    tmp_path_factory, speeches, stride
):
    root = tmp_path_factory.mktemp("root")
    speeches = [*speeches, ("LONG", 400)]
    said = {}
    blocks = []
    for number, (speaker, length) in enumerate(speeches):
        words = "".join(chr(97 + (number * 7 + at * at) % 26) for at in range(length))
        said.setdefault(speaker, []).append(words)
        blocks.append(f"{speaker}:\n{words}\n")
    write(root, "\n".join(blocks))
    data = opened(root, f"shakespeare:{stride}")
    train, test = slow({speaker: "\n".join(parts) for speaker, parts in said.items()}, stride)
    assert strings(data, data.train) == train
    assert strings(data, data.test) == test


def test_samples_are_tokens_that_nothing_normalises(tmp_path):
    write(tmp_path, "ONE:\n" + "to be or not to be, " * 20 + "\n\nTWO:\nNo.\n")
    data = opened(tmp_path)
    inputs = data.train.take(torch.tensor([3, 1])).inputs(slice(None))
    assert inputs.dtype == torch.int64 and inputs.shape == (2, 80)
    assert data.train.all().data.dtype == torch.uint8 and data.train.shape == (80,)
    assert data.classes == tuple(sorted(set("to be or not to be, No.")))
    assert "1 of 2 speakers" in data.notes[0]


@pytest.mark.skipif(
    not ROOT or not list((Path(ROOT) / "shakespeare").glob("*.txt")),
    reason="FEDKIT_DATA_ROOT names no folder with shakespeare/NAME.txt",
)
def test_tinyshakespeare_has_its_65_characters():
    data = opened(ROOT)
    assert len(data.classes) == 65 and len(data.train) > 700_000
    assert data.train.owners.unique().numel() > 200


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "ONE:\nwords\n\nno speaker\nwords\n",
            r"play\.txt, line 4: a speech begins with a line SPEAKER:",
        ),
        (":\nwords\n", "line 1: a speech begins"),
        ("ONE:\nshort\n", "No speaker in .* says enough"),
        ("", "No speaker"),
        ("ONE:\n" + "".join(chr(0x4E00 + n) for n in range(300)), "300 different characters"),
    ],
)
def test_a_text_that_is_no_play_is_told(tmp_path, text, sentence):
    write(tmp_path, text)
    with pytest.raises(FedkitError, match=sentence):
        opened(tmp_path)


def test_another_encoding_is_told(tmp_path):
    write(tmp_path, "")
    (tmp_path / "shakespeare" / "play.txt").write_bytes("ONE:\nmüde".encode("latin-1"))
    with pytest.raises(FedkitError, match=r"play\.txt is no UTF-8 \(byte 6\)"):
        opened(tmp_path)


def leaf(users):
    return {
        "users": list(users),
        "num_samples": [len(data["y"]) for data in users.values()],
        "user_data": users,
    }


def write_leaf(root, **halves):
    for half, files in halves.items():
        folder = root / "shakespeare" / half
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(files):
            (folder / f"all_data_{number}.json").write_text(json.dumps(content))


def said(text):
    windows = [text[at : at + 80] for at in range(len(text) - 80)]
    return {"x": windows, "y": [text[at + 80] for at in range(len(text) - 80)]}


MACBETH, HAMLET = said("Is this a dagger? " * 6), said("[To be, or not to be} \n" * 5)


def test_leafs_files_are_read_with_its_vocabulary(tmp_path):
    write_leaf(
        tmp_path,
        train=[leaf({"MACBETH": MACBETH}), leaf({"HAMLET": HAMLET, "NOBODY": {"x": [], "y": []}})],
        test=[leaf({"HAMLET": MACBETH})],
    )
    data = opened(tmp_path)
    expected = [
        (window, following, owner)
        for of_user, owner in ((MACBETH, 1), (HAMLET, 0))
        for window, following in zip(of_user["x"], of_user["y"], strict=True)
    ]
    assert strings(data, data.train) == expected
    assert data.test.owners.tolist() == [0] * len(MACBETH["y"])
    assert "".join(data.classes) == LEAF_LETTERS and len(data.classes) == 80
    # As LEAF numbers them: ALL_LETTERS.find(letter).
    assert data.train.all().data[0, 0] == LEAF_LETTERS.find("I")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"users": ["A"]}, "not as LEAF writes it"),
        (leaf({"A": {"x": ["short"], "y": ["a"]}}), r"user 'A': 'short' is no string of length 80"),
        (leaf({"A": {"x": ["a" * 80], "y": ["ab"]}}), "'ab' is no string of length 1"),
        (leaf({"A": {"x": ["a" * 80], "y": []}}), "x has 1 windows, y 0"),
        (leaf({"A": {"x": ["é" * 80], "y": ["a"]}}), "'é' is not in LEAF's vocabulary"),
        (leaf({"A": {"x": ["a" * 80], "y": ["~"]}}), "'~' is not in LEAF's vocabulary"),
        (leaf({"A": {"x": "a" * 80, "y": ["a"]}}), "must be lists of strings"),
        ({"users": ["A"], "user_data": {}}, "KeyError 'A'"),
        ([], "not as LEAF writes it"),
    ],
)
def test_a_file_that_leaf_did_not_write_is_named(tmp_path, content, sentence):
    write_leaf(tmp_path, train=[content], test=[leaf({"A": MACBETH})])
    with pytest.raises(FedkitError, match=sentence) as caught:
        opened(tmp_path)
    assert "all_data_0.json" in str(caught.value)


def test_what_is_missing_or_can_not_be_meant_is_told(tmp_path):
    (tmp_path / "shakespeare").mkdir()
    with pytest.raises(FedkitError, match=r"There is no text in .*SPEAKER:.*TalwalkarLab/leaf"):
        opened(tmp_path)
    for spec in ("shakespeare:", "shakespeare:0", "shakespeare:x"):
        with pytest.raises(UsageError, match="STRIDE"):
            opened(tmp_path, spec)
    write_leaf(tmp_path, train=[leaf({"A": MACBETH})])
    with pytest.raises(FedkitError, match=r"shakespeare/test has no \.json"):
        opened(tmp_path)
    write_leaf(tmp_path, test=[leaf({"A": {"x": [], "y": []}})])
    with pytest.raises(FedkitError, match="no samples"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="leave the stride out"):
        opened(tmp_path, "shakespeare:5")
