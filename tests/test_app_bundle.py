"""A Flower App's folder: what is read, what is loaded, and what is a sentence."""

from __future__ import annotations

import sys

import pytest
from flower_apps import APPS, quickstart

from fedkit.apps.bundle import read_app, read_pairs
from fedkit.errors import UsageError


def test_an_app_is_read_without_being_run():
    app = quickstart()
    assert (app.name, app.version) == ("fedkit-tests/quickstart", "1.0.0")
    assert str(app) == "fedkit-tests/quickstart 1.0.0"
    assert read_app(APPS / "numpyclient").run_config([])["penalty.l2"] == 0.0001


def test_the_run_config_is_the_app_s_own_with_what_is_typed(tmp_path):
    app = quickstart()
    assert app.run_config([])["learning-rate"] == 0.1
    typed = app.run_config(["learning-rate=0.5 strategy='Fed Adam'", 'final-model="a b"'])
    assert typed == {
        **app.run_config([]),
        "learning-rate": 0.5,
        "strategy": "Fed Adam",
        "final-model": "a b",
    }
    file = tmp_path / "config.toml"
    file.write_text("batch-size = 8\n")
    assert app.run_config([str(file)])["batch-size"] == 8
    both = app.run_config([str(file), "learning-rate=0.5", "learning-rate=0.7"])
    assert (both["batch-size"], both["learning-rate"]) == (8, 0.7)
    assert read_app(APPS / "numpyclient").run_config(["penalty.l2=1.0"])["penalty.l2"] == 1.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning-rat=1", r"no 'learning-rat' \(did you mean learning-rate"),
        ("learning-rate", "takes \"key=1 other='word'\""),
        ("learning-rate=[", "takes \"key=1 other='word'\""),
        ("learning-rate = 0.5", "not 'learning-rate = 0.5'"),
        ("learning-rate=0.5 batch-size", "not 'learning-rate=0.5 batch-size'"),
        ("nowhere.toml", "There is no file nowhere.toml"),
    ],
)
def test_a_run_config_that_can_t_be_meant_is_a_sentence(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        quickstart().run_config([text])


def test_a_node_config_is_read_as_a_supernode_reads_it():
    assert read_pairs("--node-config", ["partition-id=0 path='/my data' fast=true x=1.5"]) == {
        "partition-id": 0,
        "path": "/my data",
        "fast": True,
        "x": 1.5,
    }


MINIMAL = """
[project]
name = "app"
version = "1"
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "one_app:server"
clientapp = "one_app:client"
"""


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        (None, "holds no pyproject.toml"),
        ("[project", "is no Flower App"),
        (MINIMAL.partition("[tool.flwr.app]")[0], r"Missing \[tool.flwr.app\] section"),
        (MINIMAL.partition("[tool.flwr.app.comp")[0], "components"),
        (MINIMAL.replace('version = "1"\n', ""), '"version" missing'),
        (MINIMAL.replace('serverapp = "one_app:server"', 'agentapp = "a:b"'), "AgentApp"),
        ("project = 3\n", "is no Flower App"),
    ],
)
def test_a_folder_without_an_app_is_a_sentence(tmp_path, toml, sentence):
    if toml is not None:
        (tmp_path / "pyproject.toml").write_text(toml)
    with pytest.raises(UsageError, match=sentence):
        read_app(tmp_path)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (None, "holds no module one_app"),
        ("", "one_app:client, the clientapp of me/app in .* is not there"),
        ("client = 3", "is a int, not a ClientApp"),
        ("import no_such_package", "needs the package no_such_package, which is not installed"),
        ("import no_such_package.inner", "needs the package no_such_package"),
        ("client = 1 / 0", r"ZeroDivisionError: division by zero \(one_app.py:1\)"),
        ("raise SystemExit('go away')", "SystemExit: go away"),
    ],
)
def test_a_component_that_can_t_be_loaded_is_a_sentence(tmp_path, monkeypatch, code, sentence):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "one_app", raising=False)
    (tmp_path / "pyproject.toml").write_text(MINIMAL)
    if code is not None:
        (tmp_path / "one_app.py").write_text(code)
    with pytest.raises(UsageError, match=sentence):
        read_app(tmp_path).client_app()
