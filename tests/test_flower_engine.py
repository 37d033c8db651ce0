"""fedkit on Flower's own engine: a real SuperLink, real SuperNodes, `flwr run`."""

import json

import pytest
from inprocess import InProcessFederation
from processes import events, until
from superlink import superlink

pytestmark = pytest.mark.slow
# An interpreter for each message, and perhaps others at work on the same cores.
LONG = 1800
KTPFL = {
    "strategy": "ktpfl",
    "public": "digits:64",
    "rounds": 3,
    "seed": 3,
    "local_epochs": 1,
}
MODELS = ("logistic", "mlp:8")


def usual():
    """The digest of the other engines."""
    federation = InProcessFederation(clients=2, models=",".join(MODELS), alone=False, **KTPFL)
    return federation.run()["digest"]


def test_the_history_is_that_of_the_link(tmp_path):
    """One node's memory lies in a folder, the other's in Flower's."""
    with superlink(tmp_path) as link:
        link.node("one", partition_id=0, model=MODELS[0], state_dir=str(tmp_path / "device"))
        link.node("two", partition_id=1, model=MODELS[1])
        run = link.run(num_shards=2, min_clients=2, run_dir=str(tmp_path / "run"), **KTPFL)
        assert run.wait(LONG) == 0, link.logs()
        assert "Digest " in (tmp_path / "run.log").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["status"]) == ("flower", "completed")
    assert summary["digest"] == usual()


def test_a_node_that_is_killed_comes_back_and_goes_on_from_its_folder(tmp_path):
    """The SuperNode that is started in its place has another id, and the same client's state."""
    run_dir = tmp_path / "run"
    with superlink(tmp_path) as link:
        config = [
            {"partition_id": at, "model": model, "state_dir": str(tmp_path / f"device-{at}")}
            for at, model in enumerate(MODELS)
        ]
        link.node("one", **config[0])
        second = link.node("two", **config[1])
        run = link.run(
            num_shards=2,
            min_clients=2,
            quorum=1.0,
            rejoin_wait=300.0,
            run_dir=str(run_dir),
            **KTPFL,
        )
        until(lambda: rounds(run_dir), LONG)
        second.kill()
        link.node("two-again", **config[1])
        assert run.wait(LONG) == 0, link.logs()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed", link.logs()
    assert summary["digest"] == usual()
    joined = [event["client"] for event in events(run_dir) if event["event"] == "join"]
    assert sorted(joined) == [0, 1, 1]


def rounds(run_dir):
    """The rounds that are over."""
    return [e for e in events(run_dir) if e["event"] == "round" and e.get("name") == "seconds"]
