"""Whole federations of real processes over real gRPC."""

from __future__ import annotations

import json
import tomllib

import pytest
from inprocess import InProcessFederation
from processes import events, fedkit

from fedkit import Federation

SMALL = ("--models", "lenet,cnn", "-o", "local-epochs=1", "-o", "distill-epochs=1")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One small run of four clients, looked at from several sides."""
    folder = tmp_path_factory.mktemp("demo")
    done = fedkit("run", "--rounds", "2", *SMALL, "--run-dir", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "out"


def test_run_shows_progress_and_ends_with_a_table(demo):
    done, _ = demo
    assert "round 1/2" in done.stderr and "round 2/2" in done.stderr
    assert "alone" in done.stdout and "together" in done.stdout
    for model in ("lenet", "cnn"):
        assert done.stdout.count(model) == 2
    assert "everything is in out" in done.stdout


def test_summary_holds_its_contract(demo):
    summary = json.loads((demo[1] / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["status"] == "completed" and summary["stop_reason"]
    assert (summary["strategy"], summary["preset"]) == ("ktpfl", "default")
    assert (summary["dataset"], summary["public"]) == ("digits", "digits:400")
    assert (summary["partition"], summary["engine"]) == ("dirichlet:0.5", "grpc")
    assert summary["rounds"] == len(summary["history"]) == 2
    assert len(summary["digest"]) == 64
    # 400 x 10 logits each way and 400 indices down, for four clients and two rounds.
    assert summary["bytes_up"] == 4 * 2 * 400 * 10 * 4
    assert summary["bytes_down"] == 4 * 2 * (400 * 10 * 4 + 400 * 4)
    assert summary["bytes_up"] < summary["sent_up"] < 1.2 * summary["bytes_up"]
    assert summary["bytes_down"] < summary["sent_down"] < 1.3 * summary["bytes_down"]
    assert [client["id"] for client in summary["clients"]] == [0, 1, 2, 3]
    for client in summary["clients"]:
        for name in ("personal", "global", "alone_personal", "alone_global"):
            assert 0 <= client[f"{name}_accuracy"] <= 1
        assert client["cpu_seconds"] > 0 and client["shard"] == client["id"]
    accuracies = [client["global_accuracy"] for client in summary["clients"]]
    assert summary["mean_global_accuracy"] == pytest.approx(sum(accuracies) / 4)
    assert summary["worst_global_accuracy"] == min(accuracies)
    for row in summary["history"]:
        assert row["seconds"] >= row["seconds_slowest_client"] > 0
        assert row["seconds_server"] > 0


def test_metrics_say_whose_model_on_whose_data(demo):
    records = events(demo[1])
    wanted = {"time", "event", "round", "exchange", "client", "name", "value", "n"}
    assert all(record.keys() == wanted for record in records)
    measured = {
        (r["round"], r["client"], r["name"]) for r in records if r["exchange"] == "evaluate"
    }
    for model in ("own_model", "alone_model"):
        for data in ("own_train", "own_test", "global_test"):
            for what in ("accuracy", "loss"):
                for client in range(4):
                    for server_round in (1, 2):
                        assert (server_round, client, f"{model}/{data}/{what}") in measured


def test_matrix_rows_are_recorded_each_round(demo):
    rows = [r for r in events(demo[1]) if r["event"] == "coefficients"]
    assert {(r["round"], r["client"]) for r in rows} == {(t, k) for t in (1, 2) for k in range(4)}
    assert all(sum(r["value"]) == pytest.approx(1) and min(r["value"]) >= 0 for r in rows)


def test_run_directory_says_where_the_models_are(demo):
    import safetensors.numpy

    for client in range(4):
        (file,) = (demo[1] / "clients" / f"client-{client}").glob("*/model.safetensors")
        assert safetensors.numpy.load_file(file)


def test_config_runs_it_again_with_the_same_numbers(demo, tmp_path):
    _, first = demo
    config = tomllib.loads((first / "config.toml").read_text())
    assert config["clients"] == 4 and config["local-epochs"] == 1
    # By the simulation, which starts no process for each client.
    again = fedkit(
        *("simulate", "--config", str(first / "config.toml"), "--run-dir", "again"),
        *("--format", "json"),
        folder=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["digest"] == json.loads((first / "summary.json").read_text())["digest"]


def test_processes_and_one_process_agree_to_the_bit(demo):
    alike = InProcessFederation(models="lenet,cnn", rounds=2, local_epochs=1, distill_epochs=1)
    assert alike.run()["digest"] == json.loads((demo[1] / "summary.json").read_text())["digest"]


@pytest.mark.parametrize(
    ("strategy", "settings", "models"),
    [
        # Ten seconds and more each.
        pytest.param("fedavg", {}, ["global"], marks=pytest.mark.slow),
        pytest.param(
            *("feddf", {"steps": 20}, ["student-cnn", "student-lenet"]), marks=pytest.mark.slow
        ),
        pytest.param("fedmd", {"init_epochs": 3, "codec": "topk:3"}, [], marks=pytest.mark.slow),
        pytest.param(
            *("feddistill", {"exchange": "weights", "teacher_first": 1}, ["global"]),
            marks=pytest.mark.slow,
        ),
        pytest.param("fd", {}, [], marks=pytest.mark.slow),
        pytest.param("fedproto", {}, [], marks=pytest.mark.slow),
        pytest.param(
            *("fedprox", {"work": "stragglers:0.5", "corrupt": "none,noise:1.0"}, ["global"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_strategies_run_from_python(strategy, settings, models, tmp_path):
    """In processes of their own, with the same numbers as in one."""
    settings = {"strategy": strategy, "clients": 2, "rounds": 2, "models": "lenet,cnn", **settings}
    federation = Federation(**settings, run_dir=str(tmp_path / "out"))
    seen = []
    result = federation.run(seen.append)
    assert result.summary["digest"] == InProcessFederation(**settings).run()["digest"]
    assert sorted(result.summary["server_models"]) == models
    for label in models:
        assert (tmp_path / "out" / "models" / f"{label}.safetensors").exists()
    assert result.summary["status"] == "completed"
    assert result.directory == tmp_path / "out"
    assert any(event.event == "join" for event in seen)
    metrics = result.metrics
    assert set(metrics["round"]) == {1, 2}
    if strategy == "fedavg":
        assert "global_model/global_test/accuracy" in set(metrics["name"])
