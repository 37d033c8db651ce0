"""``fedkit list models``: what each network costs on given data."""

from __future__ import annotations

import json
import sys

import pytest

from fedkit.cli import app as app_module
from fedkit.cli.models import look_at, model_rows
from fedkit.errors import UsageError
from fedkit.models.build import build_model, state_bytes
from fedkit.models.known import KNOWN, Look, known_look
from fedkit.registry import names


def printed(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(app_module.app, "registered_commands", [])
    monkeypatch.setattr(sys, "argv", ["fedkit", "list", *arguments])
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def few(monkeypatch) -> None:
    monkeypatch.setattr("fedkit.cli.models.names", lambda kind: ["lenet", "logistic", "lstm"])


def test_every_network_has_its_figures_or_a_reason_on_digits():
    rows = model_rows(KNOWN["digits"])
    assert [row["name"] for row in rows] == list(names("models"))
    told = {row["name"]: row for row in rows}
    assert {name for name, row in told.items() if "refused" in row} == {"lstm", "transformer"}
    for name in ("lenet", "cnn", "shufflenet"):
        model = build_model(name, (1, 8, 8), 10, seed=1)
        assert told[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert told[name]["bytes"] == state_bytes(model)
    for name, row in told.items():
        if "refused" not in row:
            assert row["multiply_adds"] > 0
            assert row["small_images"] or name in ("logistic", "mlp")


def test_the_table_says_figures_and_reasons(monkeypatch, capsys):
    few(monkeypatch)
    status, out, _ = printed(monkeypatch, capsys, "models")
    assert status == 0 and "On data of 1x8x8 with 10 classes" in out
    lenet = next(line for line in out.splitlines() if "21,386" in line)
    assert lenet.split()[:5] == ["lenet", "21,386", "66,600", "85.5", "kB"]
    assert "lstm reads sequences of tokens" in out


def test_json_has_the_same_rows(monkeypatch, capsys):
    few(monkeypatch)
    arguments = ("models", "--dataset", "shakespeare", "--format", "json")
    status, out, _ = printed(monkeypatch, capsys, *arguments)
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["lstm"]["parameters"] == 819_920
    assert "reads images" in rows["lenet"]["refused"]
    assert "tokens" in rows["logistic"]["refused"]


def test_a_row_of_unknown_kind_is_read_by_networks_for_either(monkeypatch):
    few(monkeypatch)
    rows = {row["name"]: row for row in model_rows(look_at(None, "60", 10, {}))}
    assert rows["logistic"]["parameters"] == 610
    assert rows["lstm"]["parameters"] > 0
    assert "refused" in rows["lenet"]


def test_other_data_sets_are_opened_to_be_looked_at(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "from fedkit.data.samples import DataSet, pool_of\n"
        "def small():\n"
        "    images = torch.zeros(4, 3, 9, 11, dtype=torch.uint8)\n"
        "    pool = pool_of(images, torch.tensor([0, 1, 0, 1]), torch.zeros(3), torch.ones(3))\n"
        "    return DataSet('small', pool, pool, ('no', 'yes'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert look_at("own_data:small", None, None, {}) == Look((3, 9, 11), 2, tokens=False)


@pytest.mark.parametrize(
    ("spec", "look"),
    [
        ("cifar100:coarse", Look((3, 32, 32), 20)),
        ("emnist:letters", Look((1, 28, 28), 26)),
        ("synthetic:0.5,0.5", Look((60,), 10)),
        ("folder:mnist", None),
        ("cifar10:x", None),
    ],
)
def test_known_data_sets_need_no_files(spec, look):
    assert known_look(spec) == look


def test_digits_look_as_they_are():
    from fedkit.data.datasets import open_dataset
    from fedkit.settings import DataSettings

    opened = open_dataset("digits", DataSettings())
    assert (opened.train.shape, len(opened.classes)) == KNOWN["digits"][:2]


@pytest.mark.parametrize(
    ("dataset", "shape", "classes", "words"),
    [
        ("digits", "3x32x32", 10, "give one of them"),
        (None, "3x32x32", None, "needs --classes"),
        (None, "3x32x32", 0, "needs --classes"),
        (None, None, 10, "goes with --shape"),
        (None, "3x32", 10, "as in 3x32x32"),
        (None, "0x32x32", 10, "as in 3x32x32"),
        (None, "axbxc", 10, "as in 3x32x32"),
        (None, "-3", 10, "as in 3x32x32"),
        ("cifr", None, None, "did you mean cifar10"),
    ],
)
def test_options_that_contradict_each_other_are_told(dataset, shape, classes, words):
    with pytest.raises(UsageError, match=words):
        look_at(dataset, shape, classes, {})


def test_options_for_models_are_refused_elsewhere(monkeypatch, capsys):
    status, _, err = printed(monkeypatch, capsys, "codecs", "--shape", "3x32x32")
    assert status == 2 and "fedkit list models" in err
