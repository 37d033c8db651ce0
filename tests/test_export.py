"""`fedkit export` and `fedkit evaluate`: the models of a run and of a client, as they are on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import typer
from flwr.app import ArrayRecord, RecordDict
from processes import Process, children_of, events, fedkit, until
from safetensors import safe_open
from typer.testing import CliRunner

from fedkit.cli import evaluate as evaluate_command
from fedkit.cli import export as export_command
from fedkit.data.datasets import open_dataset
from fedkit.data.samples import DataSet
from fedkit.engine import evaluate as measuring
from fedkit.engine.saved import kept_model, models_of
from fedkit.engine.state import FederationState
from fedkit.errors import FedkitError, UsageError
from fedkit.models.build import build_model
from fedkit.models.files import load_model, network, save_model
from fedkit.settings import DataSettings

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
QUICK = ("--clients", "2", "-o", "local-epochs=1")
app = typer.Typer()
export_command.register(app)
evaluate_command.register(app)


def call(*words: object) -> str:
    """What a command prints; what it raises is raised."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a model at the server (a student) and one with each client; nobody changes it."""
    folder = tmp_path_factory.mktemp("run")
    done = fedkit(
        *("run", "--strategy", "feddistill", "--models", "lenet:batch,cnn", "--rounds", "2"),
        *(*QUICK, "-o", "steps=25", "--run-dir", "out"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture
def copy(run, tmp_path):
    """The same run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def state_of(run: Path, client: int = 0) -> Path:
    return run / "clients" / f"client-{client}"


def federation_of(state: Path) -> Path:
    (manifest,) = state.glob("*/manifest.json")
    return manifest.parent


def flip(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def digits() -> DataSet:
    return open_dataset("digits", DataSettings())


# Export.


@pytest.mark.parametrize(("label", "spec"), [("client-0", "lenet:batch"), ("global", "lenet")])
@pytest.mark.parametrize("format", ["safetensors", "pt", "onnx"])
def test_what_was_exported_predicts_what_the_saved_model_predicts(
    run, tmp_path, label, spec, format
):
    file = tmp_path / f"model.{format}"
    if format == "onnx":
        pytest.importorskip("onnx", reason="the extra fedkit[onnx] is not installed")
        pytest.importorskip("onnxscript", reason="the extra fedkit[onnx] is not installed")
    call("export", run, "--model", label, "--out", file)
    images = digits().test.all().inputs(slice(0, 20))
    (found,) = [model for model in models_of(run) if model.label == label]
    with torch.inference_mode():
        wanted = network(found.read())(images)
    if format == "onnx":
        from onnx.reference import ReferenceEvaluator

        got = ReferenceEvaluator(str(file)).run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-4)
        return
    if format == "pt":
        state = torch.load(file, weights_only=True)
    else:
        state = {n: torch.from_numpy(a) for n, a in safetensors.numpy.load_file(file).items()}
    fresh = build_model(spec, (1, 8, 8), 10, seed=9).eval()
    fresh.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(fresh(images), wanted)


def test_an_exported_file_says_what_it_is(run, tmp_path):
    call("export", run, "--model", "client-1", "--out", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
    assert (about["architecture"], about["client"], about["round"]) == ("cnn", 1, 2)
    assert (about["shape"], about["outputs"]) == ([1, 8, 8], 10)
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert np.allclose([*about["mean"], *about["std"]], [4.884, 6.017])
    settings = about["settings"]
    assert (settings["dataset"], settings["seed"], settings["num-shards"]) == ("digits", 1, 2)


def test_two_exports_of_one_model_are_the_same_bytes(run, tmp_path):
    for name in ("a", "b"):
        call("export", run, "--model", "client-0", "--out", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # What the client wrote at the run's end is the same model.
    own = federation_of(state_of(run)) / "model.safetensors"
    assert own.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_the_file_is_named_by_label_and_format(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = call("export", run, "--model", "client-0/alone", "--format", "pt")
    assert "client-0-alone.pt" in told
    assert torch.load("client-0-alone.pt", weights_only=True)


def test_a_file_that_is_there_is_left_alone(run, tmp_path):
    file = tmp_path / "mine.pt"
    file.write_text("precious")
    with pytest.raises(UsageError, match=r"mine.pt is there already"):
        call("export", run, "--model", "client-0", "--out", file)
    assert file.read_text() == "precious"


def test_without_the_extra_onnx_is_a_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FedkitError, match=r"pip install 'fedkit\[onnx\]'"):
        call("export", run, "--model", "client-1", "--out", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# Evaluate.


def last_measured(run: Path) -> dict[tuple[int | None, str], tuple[float, int]]:
    return {
        (record["client"], record["name"]): (record["value"], record["n"])
        for record in events(run)
        if record["event"] == "metric" and record["exchange"] == "evaluate"
    }


def test_evaluate_gives_the_numbers_of_the_run_to_the_bit(run):
    done = fedkit("evaluate", str(run), "--format", "json", folder=run.parent)
    assert done.returncode == 0, done.stderr
    rows, measured = json.loads(done.stdout), last_measured(run)
    seen = set()
    for row in rows:
        whose, _, slot = row["model"].partition("/")
        slot = "global" if whose == "global" else slot or "own"
        name = f"{slot}_model/{row['data']}"
        for what in ("accuracy", "loss"):
            assert (row[what], row["n"]) == measured[row["client"], f"{name}/{what}"], row
        seen.add((row["client"], name))
    every = {(0, "own"), (1, "own"), (0, "alone"), (1, "alone")}
    assert seen == {(None, "global_model/global_test")} | {
        (client, f"{slot}_model/{data}")
        for client, slot in every
        for data in ("own_test", "global_test")
    }


def test_evaluate_prints_a_line_for_each_set_of_data(run):
    lines = call("evaluate", run, "--model", "client-1").splitlines()
    assert lines[0].split() == ["model", "network", "round", "data", "n", "accuracy", "loss"]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["client-1", "cnn", "2", "digits", data] for data in ("global_test", "own_test")
    ]


def rows_of(path: Path, *options: object) -> list[dict[str, object]]:
    rows = json.loads(call("evaluate", path, "--format", "json", *options))
    return [{name: row[name] for name in row if name != "model"} for row in rows]


def test_a_state_directory_without_its_model_file_gives_the_same(run, copy):
    wanted = rows_of(run, "--model", "client-0")
    state = state_of(copy)
    (federation_of(state) / "model.safetensors").unlink()
    assert rows_of(state, "--model", "own") == wanted
    assert rows_of(copy, "--model", "client-0") == wanted
    assert rows_of(federation_of(state_of(run)) / "model.safetensors") == wanted


def test_a_data_set_that_is_named_is_the_one_that_is_measured(run):
    assert rows_of(run, "--model", "client-0", "--dataset", "digits") == rows_of(
        run, "--model", "client-0"
    )
    with pytest.raises(UsageError, match="no data set 'digit'"):
        call("evaluate", run, "--dataset", "digit")


def test_another_data_set_is_read_on_the_scale_that_the_model_has_learned(run, monkeypatch):
    other, (found, *_) = digits(), models_of(state_of(run))
    wanted = rows_of(state_of(run), "--model", "own")[0]
    strange = replace(other.test, mean=other.test.mean + 9, std=other.test.std * 3)
    monkeypatch.setattr(
        measuring, "_open", lambda spec, sources, form: replace(other, name=spec, test=strange)
    )
    (row,) = measuring.evaluate(found.read(), DataSettings(), dataset="others")
    assert (row["dataset"], row["data"]) == ("others", "test")
    assert [row[name] for name in ("accuracy", "loss")] == [wanted["accuracy"], wanted["loss"]]


def test_images_of_another_size_are_a_sentence(run, monkeypatch):
    other, (found, *_) = digits(), models_of(state_of(run))
    larger = replace(other.test, shape=(1, 16, 16))
    monkeypatch.setattr(measuring, "_open", lambda spec, sources, form: replace(other, test=larger))
    with pytest.raises(FedkitError, match=r"images of 8x8 .*and tells 10 classes.*16x16"):
        measuring.evaluate(found.read(), DataSettings(), dataset="larger")


def test_data_are_looked_for_where_the_run_had_them(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKIT_DATA_ROOT", str(tmp_path))
    with (copy / "config.toml").open("a") as config:
        config.write('data-root = "/run/had/them/here"\n')
    with pytest.raises(FedkitError, match="data root /run/had/them/here is not a folder"):
        call("evaluate", copy, "--model", "client-0", "--dataset", "mnist")
    with pytest.raises(FedkitError, match="data root typed is not a folder"):
        call("evaluate", copy, "--model", "client-0", "--dataset", "mnist", "--data-root", "typed")


def test_other_shards_than_the_federations_are_a_sentence(run):
    saved = models_of(state_of(run))[0].read()
    foreign = replace(saved, about=replace(saved.about, partition="0" * 64))
    with pytest.raises(FedkitError, match=r"deals the data set digits into other shards"):
        measuring.evaluate(foreign, DataSettings())


# A server that was killed.


def test_without_its_model_files_the_last_checkpoint_counts(run, copy, tmp_path):
    (wanted,) = rows_of(run, "--model", "global")
    shutil.rmtree(copy / "models")
    (row,) = rows_of(copy, "--model", "global")
    assert row == {**wanted, "round": 2}
    # An older file is passed over for a newer checkpoint.
    (copy / "models").mkdir()
    shutil.copy(run / "models" / "global.safetensors", copy / "models")
    os.utime(copy / "models" / "global.safetensors", (1, 1))
    call("export", copy, "--model", "global", "--out", tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").about.round == 2


def test_a_server_whose_data_are_not_here_leaves_its_clients_models(copy, caplog, monkeypatch):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    shutil.rmtree(copy / "models")
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace('"digits"', '"cifar10"'))
    assert [model.label for model in models_of(copy)][:2] == ["client-0", "client-0/alone"]
    assert "server's models of" in caplog.text and "CIFAR10 needs a folder" in caplog.text


# A client that was killed, or lives.


@on_linux
def test_a_client_killed_in_mid_run_still_has_its_model(tmp_path):
    arguments = ("--strategy", "fd", "--models", "lenet", "--rounds", "500", *QUICK)
    with Process(*("run", *arguments, "--run-dir", "out"), folder=tmp_path, name="run") as process:
        run = tmp_path / "out"
        until(lambda: any(record["event"] == "round" for record in events(run)))
        os.kill(max(children_of(process.process.pid)), signal.SIGKILL)
        assert process.wait() == 1
    state = state_of(run, 1)
    folder = federation_of(state)
    assert not (folder / "model.safetensors").exists() and not (run / "models").exists()
    kept = RecordDict()
    FederationState(folder, json.loads((folder / "manifest.json").read_text())["owner"]).restore(
        kept
    )
    wanted = {name: array.numpy() for name, array in kept.array_records["own-model"].items()}
    for path, label in ((state, "own"), (run, "client-1")):
        file = tmp_path / f"{label}.safetensors"
        call("export", path, "--model", label, "--out", file)
        saved = load_model(file)
        assert saved.arrays.keys() == wanted.keys()
        assert all(np.array_equal(saved.arrays[name], wanted[name]) for name in wanted)
        assert saved.about.round >= 1
    own = [row for row in rows_of(run, "--model", "client-1") if row["data"] == "own_test"]
    assert len(own) == 1 and 0 < own[0]["accuracy"] <= 1


def test_a_client_that_goes_on_meanwhile_is_read_again(copy, monkeypatch):
    folder = federation_of(state_of(copy))
    writer, content = FederationState(folder, None), RecordDict()
    writer.restore(content)
    original, left = FederationState.record, [1]

    def record(self, name):
        if left and self is not writer:
            left.pop()
            now = content["own-model"].to_torch_state_dict()
            content["own-model"] = ArrayRecord({key: value + 1 for key, value in now.items()})
            writer.commit("f/3/train/2/9", [b"reply"], content, 3)
        return original(self, name)

    before = kept_model(folder).arrays["0.bias"]
    monkeypatch.setattr(FederationState, "record", record)
    after = kept_model(folder)
    assert not left
    assert np.array_equal(after.arrays["0.bias"], before + 1) and after.about.round == 3


def test_of_several_federations_the_newest_is_meant(copy):
    state = state_of(copy)
    newest = federation_of(state)
    older = Path(shutil.copytree(newest, state / "older"))
    flip(next(older.glob("*-own-model.records")))
    for file in older.iterdir():
        os.utime(file, (1, 1))
    assert rows_of(state, "--model", "own")
    with pytest.raises(FedkitError, match=r"older/\d+-own-model.records is damaged"):
        call("evaluate", state, "--model", "own", "--federation", "older")
    with pytest.raises(UsageError, match=r"knows no federation 'oldest'.*older"):
        call("evaluate", state, "--federation", "oldest")


# Damage, and what was meant otherwise.


@pytest.mark.parametrize("at", [-5, 200, 3])
def test_a_damaged_model_file_is_named(copy, at):
    file = copy / "models" / "global.safetensors"
    flip(file, at)
    with pytest.raises(FedkitError, match=r"global.safetensors .*(damaged|can't be read)"):
        call("evaluate", copy, "--model", "global")


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_a_model_file_that_is_cut_short_is_named(copy, length):
    file = copy / "models" / "global.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FedkitError, match=r"global.safetensors can't be read"):
        call("export", copy, "--model", "global")


def test_a_damaged_record_is_named_and_the_others_still_read(copy, tmp_path):
    folder = federation_of(state_of(copy))
    (record,) = folder.glob("*-alone-model.records")
    flip(record)
    with pytest.raises(FedkitError, match=f"{record.name} is damaged"):
        call("export", copy, "--model", "client-0/alone", "--out", tmp_path / "m.pt")
    call("export", copy, "--model", "client-0", "--out", tmp_path / "m.pt")
    record.unlink()
    with pytest.raises(FedkitError, match=f"{record.name} can't be read"):
        call("export", copy, "--model", "client-0/alone", "--out", tmp_path / "other.pt")


def test_a_damaged_manifest_is_named(copy):
    (federation_of(state_of(copy)) / "manifest.json").write_text("{")
    with pytest.raises(FedkitError, match=r"manifest.json is damaged"):
        call("export", copy, "--model", "client-0")


def lying(run: Path, file: Path, **lies: object) -> Path:
    """A model file whose checksum is right, and which says something else than it holds."""
    saved = models_of(state_of(run))[0].read()
    save_model(file, saved.arrays, replace(saved.about, **lies))
    return file


@pytest.mark.parametrize(
    ("lies", "sentence"),
    [
        ({"shape": (1, 60000, 60000)}, r"9\.weight has the shape"),
        ({"outputs": 10**9}, r"13\.weight has the shape"),
        ({"architecture": "cnn"}, "do not fit the network cnn"),
        ({"architecture": "nonet"}, "no model 'nonet'"),
        ({"architecture": "os:system"}, "no model 'os'"),
        ({"shape": (1, 8, 0)}, "is no size"),
        ({"std": (0.0,)}, "can't be read"),
        ({"classes": ()}, "names 0 classes for 10 outputs"),
        ({"client": -1}, "can't be read"),
        ({"settings": {"threads": 0}}, "threads must be at least 1"),
        ({"client": 7}, "no shard 7"),
    ],
)
def test_a_file_that_lies_is_a_sentence(run, tmp_path, lies, sentence):
    file = lying(run, tmp_path / "liar.safetensors", **lies)
    with pytest.raises(FedkitError, match=sentence):
        call("evaluate", file)


def test_weights_of_another_program_are_exported_and_not_measured(run, tmp_path):
    file = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, file)
    call("export", file, "--out", tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=True)["w"], torch.ones(3))
    for command in (("evaluate", file), ("export", file, "--format", "onnx")):
        with pytest.raises(FedkitError, match="does not say which network its weights are of"):
            call(*command)


def test_what_is_not_there_is_a_sentence(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    (waiting / "identity.json").write_text("{}")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.toml").write_text("")
    for path, kind, sentence in (
        (tmp_path / "nothing", UsageError, "There is no run or state directory"),
        (empty, UsageError, "neither a run directory .* nor a client's state directory"),
        (waiting, FedkitError, "holds no model yet"),
        (begun, FedkitError, "holds no model: the server's are written when its run ends"),
    ):
        with pytest.raises(kind, match=sentence):
            call("export", path)
    with pytest.raises(UsageError, match=r"no model 'client-7' \(did you mean client-"):
        call("export", run, "--model", "client-7")
    with pytest.raises(UsageError, match="--model, one of global, client-0, client-0/alone, clie"):
        call("export", run)
    with pytest.raises(UsageError, match="--format takes safetensors, pt or onnx, not 'h5'"):
        call("export", run, "--model", "global", "--format", "h5")


def test_the_command_line_knows_both(run):
    done = fedkit("export", str(run), folder=run.parent)
    assert done.returncode == 2 and done.stderr.startswith("Error: Which model of ")
    assert "Traceback" not in done.stderr
