"""fedkit on Flower's own engine: a real SuperLink, real SuperNodes, `flwr run`."""

import json
from pathlib import Path

import pytest
from inprocess import InProcessFederation
from processes import events, until
from superlink import VERY_LONG, superlink, toml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
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
        config = KTPFL | {"num_shards": 2, "min_clients": 2, "run_dir": str(tmp_path / "run")}
        assert "Digest " in link.run_to_the_end(ROOT, toml(config))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["status"]) == ("flower", "completed")
    assert summary["digest"] == usual()


def test_a_node_that_is_killed_comes_back_and_goes_on_from_its_folder(tmp_path):
    """The SuperNode that is started in its place has another id, and the same client's state."""
    run_dir = tmp_path / "run"
    with superlink(tmp_path) as link:
        nodes = [
            {"partition_id": at, "model": model, "state_dir": str(tmp_path / f"device-{at}")}
            for at, model in enumerate(MODELS)
        ]
        link.node("one", **nodes[0])
        second = link.node("two", **nodes[1])
        config = KTPFL | {"num_shards": 2, "min_clients": 2, "run_dir": str(run_dir)}
        run = link.run(ROOT, toml(config | {"quorum": 1.0, "rejoin_wait": 300.0}))
        until(lambda: rounds(run_dir), VERY_LONG)
        second.kill()
        link.node("two-again", **nodes[1])
        link.ended(run)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed", link.logs()
    assert summary["digest"] == usual()
    joined = [event["client"] for event in events(run_dir) if event["event"] == "join"]
    assert sorted(joined) == [0, 1, 1]


def rounds(run_dir):
    """The rounds that are over."""
    return [e for e in events(run_dir) if e["event"] == "round" and e.get("name") == "seconds"]
