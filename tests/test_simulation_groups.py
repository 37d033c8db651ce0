"""Which clients train together in a simulation: told by what is asked, and not by who is free when."""

import sys
import time

import pytest
from flwr.app import Message, RecordDict
from inprocess import InProcessFederation
from test_simulation import FEDAVG, digest_of, simulation

from fedkit.simulation import worker
from fedkit.simulation.grid import SimulationGrid


@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")
def test_who_trains_with_whom_does_not_hang_on_who_is_slow(tmp_path, monkeypatch):
    """A padded batch, and a client by itself, are rounded in other ways: digests would not repeat."""
    give, do = SimulationGrid._give, worker._Worker.do
    found = []
    for slow in (0, 1):
        groups = []

        def delayed(self, tasks, slow=slow):
            time.sleep(0.05 * (tasks[0].client % 2 == slow))
            return do(self, tasks)

        def noted(self, worker, number, jobs, groups=groups):
            groups.append(([job.client for job in jobs], jobs[0].sent.metadata.message_type))
            give(self, worker, number, jobs)

        monkeypatch.setattr(worker._Worker, "do", delayed)
        monkeypatch.setattr(SimulationGrid, "_give", noted)
        federation = InProcessFederation(**FEDAVG | {"clients": 11, "rounds": 1})
        (tmp_path / str(slow)).mkdir()
        with simulation(tmp_path / str(slow), federation, batched=2) as grid:
            digest = digest_of(federation, grid)
        assert {len(clients) for clients, _ in groups} == {1, 2}
        found.append((sorted(groups), digest))
    assert found[0] == found[1]


@pytest.mark.parametrize("batched", [1, 4])
def test_a_client_that_is_asked_twice_does_one_after_the_other(tmp_path, batched):
    federation = InProcessFederation(**FEDAVG | {"strategy": "local"})

    def losses(grid, nodes):
        config = federation.strategy.config(1)
        replies = grid.send_and_receive(
            Message(RecordDict({"config": config}), node, "train", group_id="1") for node in nodes
        )
        return [reply.content.metric_records["metrics"]["train_loss"] for reply in replies]

    with simulation(tmp_path, federation, batched=batched) as grid:
        once, again, _ = losses(grid, [2, 2, 3])
    (tmp_path / "states" / "0.records").unlink()
    with simulation(tmp_path, federation, batched=batched) as grid:
        assert [*losses(grid, [2]), *losses(grid, [2])] == [once, again]
    assert again < once
