"""What stands beside the composition: its one-shot preparation, the unit files, `fedkit health`."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import FEDKIT, Process, events, fedkit, free_port, until

from fedkit.errors import FedkitError, UsageError
from fedkit.models.build import build_model
from fedkit.security.pem import hosts_of, purpose, read_certificate

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
SETTINGS = {"strategy": "ktpfl", "rounds": "3", "dataset": "digits"}


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", DEPLOY / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begun(run, status=None, **settings):
    run.mkdir(parents=True)
    values = {**SETTINGS, **settings}
    (run / "config.toml").write_text("".join(f'{k} = "{v}"\n' for k, v in values.items()))
    if status:
        (run / "summary.json").write_text(json.dumps({"status": status}))


def test_settings_and_models_come_from_the_environment(prepare):
    environment = {"SETTING_NUM_SHARDS": "12", "MODEL_PHONE": "lenet", "PATH": "/bin", "HOME": "/"}
    environment |= {"WIDTH_PHONE": "0.25", "WIDTH_BOARD": ""}
    settings, models, widths = prepare.read_environment(environment)
    assert (settings, models) == ({"num-shards": "12"}, {"phone": "lenet"})
    assert widths == {"phone": "0.25"}


@pytest.mark.parametrize("status", [None, "stopped", "failed"])
def test_a_run_that_is_not_over_stays_where_it_is(prepare, tmp_path, status):
    begun(tmp_path / "latest", status)
    prepare.put_aside(tmp_path / "latest", SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


@pytest.mark.parametrize(("status", "strategy"), [("completed", "ktpfl"), (None, "fedmd")])
def test_a_run_that_is_over_or_another_one_gets_a_name_of_its_own(
    prepare, tmp_path, status, strategy
):
    begun(tmp_path / "latest", status, strategy=strategy)
    prepare.put_aside(tmp_path / "latest", SETTINGS)
    (moved,) = tmp_path.iterdir()
    assert moved.name.endswith(f"-{strategy}") and (moved / "config.toml").exists()


def test_certificates_are_made_once_and_the_authority_stays_apart(prepare, tmp_path):
    for folder in ("authority", "server", "clients"):
        (tmp_path / folder).mkdir()
    prepare.make_certificates(tmp_path, ["phone"])
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    # An interrupted start leaves a key without a certificate.
    (tmp_path / "clients" / "phone.pem").unlink()
    prepare.make_certificates(tmp_path, ["phone"])
    changed = {file.name for file, was in files.items() if file.read_bytes() != was}
    assert changed == {"phone.key", "phone.csr", "phone.pem"}
    assert [file.parent.name for file in tmp_path.rglob("ca.key")] == ["authority"]
    assert not (tmp_path / "clients" / "server.key").exists()
    assert hosts_of(read_certificate(tmp_path / "server" / "server.pem")) == ["server", "localhost"]
    assert "client" in purpose(read_certificate(tmp_path / "server" / "health.pem"))
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.rglob("*.key"))


def test_a_network_that_the_strategy_would_not_train_is_refused(prepare, monkeypatch):
    planned = {"strategy": "fedavg", "clients": [{"model": "lenet"}, {"model": "lenet"}]}
    monkeypatch.setattr(prepare, "_dry_run", lambda words: planned)
    models = {"phone": "", "board": "cnn"}
    with pytest.raises(UsageError, match=r"the service board has cnn: set FEDKIT_MODEL in .env"):
        prepare.check_settings({"model": "lenet"}, models, {}, "")


def test_a_width_for_each_service_is_tried(prepare, capsys):
    settings = {"strategy": "heterofl", "model": "mlp:16", "num-shards": "4"}
    models = {"phone": "mlp:16", "board": "mlp:16"}
    prepare.check_settings(settings, models, {"board": "0.25"}, "")
    assert "mlp:16, mlp:16" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        prepare.check_settings(settings, models, {"board": "7"}, "")
    assert ended.value.code == 2
    with pytest.raises(SystemExit):  # for FedAvg all are as wide
        prepare.check_settings({**settings, "strategy": "fedavg"}, models, {"board": "0.25"}, "")


def test_the_settings_are_tried_and_what_is_wrong_is_said_once(tmp_path):
    wrong = {"SETTING_STRATEGY": "ktpfll", "SETTING_MODEL": "lenet", "MODEL_PHONE": "cnn"}
    ran = subprocess.run(
        [sys.executable, str(DEPLOY / "prepare.py")],
        env=wrong,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "Error: There is no strategy 'ktpfll' (did you mean ktpfl?).\n"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("unit", ["fedkit-server.service", "fedkit-client.service"])
def test_unit_files_are_what_systemd_understands(tmp_path, unit):
    # The command and the user are the device's; everything else is as it stands.
    text = (DEPLOY / unit).read_text().replace("/opt/fedkit/bin/fedkit", FEDKIT[0])
    (tmp_path / unit).write_text(text.replace("User=fedkit", "User=root"))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    # Units of the machine's own may be complained of.
    assert ran.returncode == 0 and unit not in ran.stdout + ran.stderr, ran.stderr


def test_health_tells_whether_a_server_serves(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    before = fedkit("health", "--server", address, folder=tmp_path)
    assert before.returncode == 1 and before.stdout == ""
    assert before.stderr.startswith(f"Error: No server answers at {address}: ")
    words = ("server", "--listen", address, "--run-dir", "run")
    with Process(*words, folder=tmp_path, name="server"):
        until(lambda: events(tmp_path / "run"))
        serving = fedkit("health", "--server", address, folder=tmp_path)
    assert (serving.returncode, serving.stdout) == (0, "SERVING\n")


@pytest.mark.parametrize("model", ["resnet18", "shufflenet", "vit", "mobilenet_v2"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
            "is not installed",
        ),
        (RuntimeError("operator torchvision::nms does not exist"), "nms does not exist"),
    ],
)
def test_torchvisions_networks_say_what_they_lack(monkeypatch, model, error, told):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(FedkitError, match=told) as raised:
        build_model(model, (1, 8, 8), 10, seed=1)
    # shufflenet is shufflenet_v2_x1_0 there.
    assert re.match(rf"{model}\w* is one of torchvision's networks", str(raised.value))


@pytest.mark.parametrize("model", ["lenet", "cnn", "mlp", "cnn2", "heterofl-cnn", "preresnet18"])
def test_other_networks_need_no_torchvision(monkeypatch, model):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    build_model(model, (1, 8, 8), 10, seed=1)
