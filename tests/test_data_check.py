"""``fedkit data check``: what would be used, and what is broken, before anything is joined."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from fedkit import registry
from fedkit.cli import data
from fedkit.data.examine import examine
from fedkit.errors import UsageError
from fedkit.settings import DataSettings


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setattr(registry, "_allowed", set())


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Twenty pictures for training, and four for testing of which one is a training picture."""
    for number in range(20):
        save(tmp_path / "pictures" / "train" / "ab"[number % 2] / f"{number}.png", number)
    for number in range(3):
        save(tmp_path / "pictures" / "test" / "a" / f"{number}.png", 100 + number)
    save(tmp_path / "pictures" / "test" / "b" / "again.png", 7)
    return tmp_path


def found(root, spec="folder:pictures", public=None):
    by_check = {}
    for finding in examine(spec, DataSettings(str(root)), public):
        by_check.setdefault(finding.check, []).append(finding)
    return by_check


def statuses(findings):
    return {finding.status for of_check in findings.values() for finding in of_check}


def test_what_would_be_used_is_told(root):
    findings = found(root)
    told = {check: of_check[0].text for check, of_check in findings.items()}
    assert told["data set"] == "folder:pictures: 20 training samples, 4 test samples"
    assert told["classes"] == "2, with training samples: 'a' 10, 'b' 10"
    assert told["samples"].startswith(
        "images of 8x8 with 3 channels, 0.0 MB; normalised by mean 123.7"
    )
    assert str(root / "pictures") in told["files"] and "none are published" in told["files"]
    assert findings["duplicates"][0].values == {"samples": 1, "of": 4}
    assert statuses(findings) == {"ok", "warning"}


def test_every_broken_picture_is_found_and_ten_are_named(root):
    for_training = sorted((root / "pictures" / "train").rglob("*.png"))
    spoilt = [*for_training[::2], root / "pictures" / "test" / "a" / "1.png"]
    for path in spoilt[:9]:
        path.write_bytes(b"")
    for path in spoilt[9:]:
        path.write_bytes(path.read_bytes()[:60])
    findings = found(root)
    assert findings["content"][0].values == {"part": "training", "samples": 20, "broken": 10}
    assert findings["content"][1].values == {"part": "test", "samples": 4, "broken": 1}
    sentences = "".join(finding.text for finding in findings["broken"])
    assert all(str(path) in sentences for path in spoilt)
    save(root / "pictures" / "train" / "c" / "more.png", 50)
    (root / "pictures" / "train" / "c" / "more.png").write_bytes(b"")
    findings = found(root)
    assert findings["content"][0].values["broken"] == 11
    assert len(findings["broken"]) == 11  # ten of eleven, and the one for testing
    assert findings["classes"][0].status == "ok"  # a class is what its folder says


def test_samples_without_a_class_and_classes_without_samples_are_told(root):
    (root / "pictures" / "train" / "empty").mkdir()
    (root / "pictures" / "notes.txt").write_text("nothing")
    findings = found(root)
    assert findings["classes"][0].text.endswith("1 without any, as 'empty'")
    assert findings["passed over"][0].text.startswith("1 passed over")


def test_a_public_set_is_compared_by_content(root):
    for number in (0, 1, 102, 200):
        save(root / "public" / f"{number}.png", number)
    findings = found(root, public="folder:public")
    assert (
        findings["public set"][0].status == "ok" and "no labels" in findings["public set"][0].text
    )
    assert [finding.values["samples"] for finding in findings["overlap"]] == [2, 1]


def test_a_public_set_that_does_not_fit_is_refused(root):
    (root / "t.csv").write_text("a,b,label\n1,2,x\n3,4,y\n")
    assert "one network can't read both" in found(root, public="csv:t.csv")["public set"][0].text
    findings = found(root, public="folder:pictures:20")
    assert findings["public set"][0].status == "FAIL" and "overlap" not in findings
    assert found(root, public="folder:pictures:19")["public set"][0].status == "ok"


def test_own_takes_its_form_from_the_public_set(root):
    findings = found(root, "own:cat,dog", "folder:pictures")
    assert findings["classes"][0].text == "2: 'cat', 'dog'"
    assert findings["samples"][0].values["shape"] == [3, 8, 8] and "overlap" not in findings


def test_a_data_set_that_can_not_be_opened_is_one_finding(root):
    findings = found(root, "mnist")
    assert list(findings) == ["data set"] and statuses(findings) == {"FAIL"}
    with pytest.raises(UsageError, match="did you mean digits"):
        found(root, "digts")


@pytest.fixture
def command():
    app = typer.Typer()
    data.register(app)
    return lambda *words: CliRunner().invoke(app, ["data", "check", *words])


def test_the_command_prints_lines_or_json_and_fails_where_something_is_broken(root, command):
    spec = f"folder:{root}/pictures"  # named on the command line, and so allowed
    lines = command(spec)
    assert lines.exit_code == 0 and lines.stdout.startswith("ok      data set    folder:")
    (root / "pictures" / "test" / "a" / "1.png").write_bytes(b"")
    answer = command(spec, "--format", "json")
    assert answer.exit_code == 1
    told = json.loads(answer.stdout)
    assert told["ok"] is False and told["dataset"] == spec
    broken = [finding for finding in told["findings"] if finding["check"] == "broken"]
    assert len(broken) == 1 and "1.png is empty" in broken[0]["text"]


def test_the_public_set_is_allowed_with_and_without_a_number(root, command):
    spec = f"folder:{root}/pictures"
    for public in (f"{spec}:5", f"{root}/nothing", f"folder:{root}/pictures,grey"):
        result = command("digits", "--public", public)
        assert "--allow" not in str(result.exception) + result.stdout


def test_names_of_files_can_not_write_on_the_screen(tmp_path, command):
    save(tmp_path / "pictures" / "a\x1b[31m" / "0.png", 0)
    result = command("folder:pictures", "--data-root", str(tmp_path))
    assert "a?[31m" in result.stdout.replace("\\x1b", "?") and "\x1b" not in result.stdout
