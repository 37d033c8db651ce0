"""Shakespeare by speaker: 80 characters, and which one comes next.

Either LEAF's own files (Caldas et al. 2018; its preprocessing makes them, with its vocabulary of 80
characters), or plain text in which speeches are separated by an empty line and begin with a line
``SPEAKER:``. There, windows are cut within what one speaker says; they are made when they are taken, from
the text as one number a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkit.data.found import Found
from fedkit.data.places import data_root
from fedkit.data.samples import Form, Pool, pool_of
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings

WINDOW = 80
TRAIN = 0.8
# LEAF's (models/utils/language_utils.py), which is in the order of the characters' numbers.
LEAF_LETTERS = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
NO_NORMALISATION = torch.empty(0)


@dataclass(frozen=True)
class Speaker:
    """What one speaker says, as a place in the text of all: from ``start`` up to ``end``."""

    name: str
    start: int
    end: int

    @property
    def cut(self) -> int:
        """Where the test part begins."""
        return self.start + int(TRAIN * (self.end - self.start))


def shakespeare(argument: str | None, sources: DataSettings, form: Form | None = None) -> Found:
    """Shakespeare by speaker: the next character after 80; shakespeare[:STRIDE].

    Of plain text, each speaker's first 80 % are training data, the rest test data, and no window lies
    across the cut (LEAF's split by time); the next window begins STRIDE characters later (1, as in
    LEAF). Who says too little for one window of training data is left out. The owners of samples are
    the speakers.
    """
    stride = 1 if argument is None else _stride(argument)
    name = "shakespeare" if argument is None else f"shakespeare:{argument}"
    folder = data_root("Shakespeare", sources) / "shakespeare"
    if (folder / "train").is_dir():
        if argument is not None:
            raise UsageError(
                f"{folder} has LEAF's finished windows: leave the stride out of {name}."
            )
        return _leaf(name, folder)
    texts = sorted(folder.glob("*.txt"))
    if not texts:
        raise FedkitError(
            f"There is no text in {folder}: put a plain text there (NAME.txt, speeches that begin with a "
            "line SPEAKER: and end with an empty one), or LEAF's folders train and test "
            "(github.com/TalwalkarLab/leaf, data/shakespeare: `./preprocess.sh -s niid --sf 1.0 -k 0 -t "
            "sample -tf 0.8` makes them)."
        )
    return _plain(name, texts, stride)


def _stride(argument: str) -> int:
    if not argument.isdecimal() or not 0 < int(argument) <= 10**6:
        raise UsageError(f"shakespeare:STRIDE takes a number of characters, not {argument!r}.")
    return int(argument)


def _plain(name: str, texts: list[Path], stride: int) -> Found:
    said: dict[str, list[str]] = {}
    for path in texts:
        for speaker, speech in _speeches(path):
            said.setdefault(speaker, []).append(speech)
    joined = {speaker: "\n".join(speeches) for speaker, speeches in sorted(said.items())}
    everything = "".join(joined.values())
    codes = np.frombuffer(everything.encode("utf-32-le"), dtype="<u4")
    letters, tokens = np.unique(codes, return_inverse=True)
    if len(letters) > 256:
        raise FedkitError(
            f"{texts[0].parent} has {len(letters)} different characters; 256 can be told apart."
        )
    ends = np.cumsum([len(speech) for speech in joined.values()]).tolist()
    speakers = [
        Speaker(speaker, end - len(speech), end)
        for (speaker, speech), end in zip(joined.items(), ends, strict=True)
    ]
    kept = [speaker for speaker in speakers if speaker.cut - speaker.start > WINDOW]
    if not kept:
        raise FedkitError(
            f"No speaker in {texts[0].parent} says enough for one window of {WINDOW}."
        )
    text, few = tokens.astype(np.uint8), len(speakers) - len(kept)
    short = f"{few} of {len(speakers)} speakers say too little for one window and were left out"
    return Found(
        name,
        _windows(text, [(speaker.start, speaker.cut) for speaker in kept], stride),
        _windows(text, [(speaker.cut, speaker.end) for speaker in kept], stride),
        tuple(chr(code) for code in letters),
        files=tuple(texts),
        notes=(short,) if few else (),
    )


def _speeches(path: Path) -> Iterator[tuple[str, str]]:
    """Speaker and words of each speech, without its first line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FedkitError(f"{path} is no UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise FedkitError(f"{path} can't be read: {error.strerror or error}.") from error
    speaker, words = "", list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip():
            if speaker and words:
                yield speaker, "\n".join(words)
            speaker, words = "", []
        elif speaker:
            words.append(line)
        elif line.rstrip().endswith(":") and len(line.strip()) > 1:
            speaker = line.strip()[:-1]
        else:
            raise FedkitError(
                f"{path}, line {number}: a speech begins with a line SPEAKER:, not {line[:40]!r}."
            )


def _windows(text: NDArray[np.uint8], spans: list[tuple[int, int]], stride: int) -> Pool:
    """Every window of ``spans`` that has a next character in the same span; one span an owner."""
    of_each = [np.arange(start, max(start, end - WINDOW), stride) for start, end in spans]
    starts = np.concatenate(of_each)
    owners = np.repeat(np.arange(len(spans)), [len(of_one) for of_one in of_each])
    along = np.arange(WINDOW)

    def read(indices: Tensor) -> Tensor:
        return torch.from_numpy(text[starts[indices.numpy()][:, None] + along])

    return Pool(
        labels=torch.from_numpy(text[starts + WINDOW].astype(np.int64)),
        read=read,
        shape=(WINDOW,),
        mean=NO_NORMALISATION,
        std=NO_NORMALISATION,
        owners=torch.from_numpy(owners),
    )


def _leaf(name: str, folder: Path) -> Found:
    halves = [sorted((folder / half).glob("*.json")) for half in ("train", "test")]
    for half, files in zip(("train", "test"), halves, strict=True):
        if not files:
            raise FedkitError(f"{folder / half} has no .json of LEAF's.")
    read = [[of_user for file in files for of_user in _users(file)] for files in halves]
    for half, of_users in zip(("train", "test"), read, strict=True):
        if not of_users:
            raise FedkitError(f"{folder / half} has no samples.")
    users = sorted({user for half in read for user, _, _ in half})
    number = {user: at for at, user in enumerate(users)}
    train, test = (_leaf_pool(half, number) for half in read)
    return Found(
        name,
        train,
        test,
        tuple(LEAF_LETTERS),
        files=tuple(file for files in halves for file in files),
    )


def _leaf_pool(
    half: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]], number: dict[str, int]
) -> Pool:
    data = np.concatenate([windows for _, windows, _ in half])
    labels = np.concatenate([following for _, _, following in half]).astype(np.int64)
    owners = np.repeat([number[user] for user, _, _ in half], [len(rows) for _, rows, _ in half])
    pool = pool_of(
        torch.from_numpy(data), torch.from_numpy(labels), NO_NORMALISATION, NO_NORMALISATION
    )
    return replace(pool, owners=torch.from_numpy(owners.astype(np.int64)))


def _users(path: Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Name, windows (n x 80) and next characters (n) of each user of one file."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        data = content["user_data"]
        users = [(str(user), data[user]["x"], data[user]["y"]) for user in content["users"]]
    except OSError as error:
        raise FedkitError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FedkitError(
            f"{path} is not as LEAF writes it (users, num_samples, user_data with x and y): "
            f"{type(error).__name__} {error}."
        ) from error
    for user, windows, following in users:
        where = f"{path}, user {user!r}"
        _check_strings(where, windows, WINDOW)
        _check_strings(where, following, 1)
        if len(windows) != len(following):
            raise FedkitError(
                f"{where}: x has {len(windows)} windows, y {len(following)} characters."
            )
        if windows:
            yield user, _encoded(where, windows).reshape(-1, WINDOW), _encoded(where, following)


def _check_strings(where: str, texts: Any, length: int) -> None:
    if not isinstance(texts, list):
        raise FedkitError(f"{where}: x and y must be lists of strings.")
    for text in texts:
        if not isinstance(text, str) or len(text) != length:
            raise FedkitError(f"{where}: {str(text)[:100]!r} is no string of length {length}.")


def _encoded(where: str, texts: list[str]) -> NDArray[np.uint8]:
    """The numbers of all characters in LEAF's vocabulary, one after another."""
    letters = np.array([ord(letter) for letter in LEAF_LETTERS])
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    tokens = np.searchsorted(letters, codes).clip(max=len(letters) - 1)
    strange = codes[letters[tokens] != codes]
    if len(strange):
        raise FedkitError(f"{where}: {chr(strange[0])!r} is not in LEAF's vocabulary.")
    return tokens.astype(np.uint8)
