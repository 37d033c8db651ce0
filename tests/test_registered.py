"""Clients that are registered and not alive: nothing is made, asked or kept of who was never chosen."""

from collections import Counter

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inprocess import InProcessFederation
from test_simulation import FEDAVG, KTPFL, digest_of, simulation

from fedkit.data.splits import cut
from fedkit.engine import local_clients
from fedkit.engine.by_rule import ByRule
from fedkit.engine.local import run_local
from fedkit.engine.plan import make_plan
from fedkit.engine.roster import Member
from fedkit.errors import UsageError
from fedkit.knowledge.arrays import read_array
from fedkit.simulation import grid as simulation_grid
from fedkit.simulation.run import simulate
from fedkit.simulation.settings import WorkerSettings

MILLION = {
    "strategy": "fedavg",
    "model": "logistic",
    "partition": "iid",
    "clients": 1_000_000,
    "num-shards": 10,
    "select": "uniform:3",
    "rounds": 2,
    "local-epochs": 1,
    "eval-every": 2,
    "alone": False,
}


def test_of_a_million_clients_only_the_chosen_are_made_join_and_are_kept(tmp_path, monkeypatch):
    plan = make_plan(MILLION | {"run-dir": str(tmp_path / "run")}, local=True)
    joined, chosen = set(), set()

    def listen(event):
        if event.event == "join":
            joined.add(event.client)
        elif event.event == "round_start":
            chosen.update(event.value)

    made = Counter()
    make = local_clients.LocalClient
    monkeypatch.setattr(
        local_clients,
        "LocalClient",
        lambda number, *told: made.update([number]) or make(number, *told),
    )
    result = simulate(plan, WorkerSettings(workers=2), [listen])
    assert joined == chosen and 3 < len(joined) <= 6
    assert {client["id"] for client in result.summary["clients"]} == joined
    kept = {
        path.parent.parent.name for path in (tmp_path / "run").glob("clients/*/*/*.safetensors")
    }
    assert kept == {f"client-{client}" for client in joined}
    assert set(made) <= joined


@pytest.mark.parametrize("case", [FEDAVG, KTPFL], ids=["fedavg", "ktpfl"])
def test_who_joins_when_chosen_has_the_numbers_of_who_joined_first(tmp_path, case):
    usual = InProcessFederation(**case).run()["digest"]
    federation = InProcessFederation(**case)
    with simulation(tmp_path, federation) as grid:
        grid.registered = ByRule(4, lambda at: Member(at + 2, at, "", "logistic", 0, 0, "cpu", ()))
        assert digest_of(federation, grid) == usual


def test_clients_take_fewer_shards_in_turn():
    plan = make_plan({"clients": 7, "num-shards": 3}, local=True)
    data = cut(plan.federation, plan.data)
    assert data.of_client(5).train.labels.equal(data.shard(2).train.labels)
    assert data.of_client(2).train.labels.equal(data.shard(2).train.labels)


def test_a_run_in_processes_wants_a_shard_for_each_client(tmp_path):
    values = {"clients": 4, "num-shards": 3, "run-dir": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="4 clients need as many shards, but num-shards is 3"):
        run_local(make_plan(values, local=True), [])
    assert not (tmp_path / "run").exists()


def test_a_selector_that_goes_by_what_clients_told_is_refused(tmp_path):
    values = MILLION | {"select": "power:10,3", "run-dir": str(tmp_path / "run")}
    with pytest.raises(UsageError, match=r"power:10,3 goes by what every client told.*uniform:50"):
        simulate(make_plan(values, local=True), WorkerSettings())
    assert not (tmp_path / "run").exists()


@given(count=st.integers(0, 9), at=st.integers(-12, 12))
def test_a_sequence_by_rule_is_the_list_of_it(count, at):
    rule, plain = ByRule(count, lambda number: number**2), [number**2 for number in range(count)]
    assert list(rule) == plain and rule[at:] == plain[at:] and len(rule) == count
    if -count <= at < count:
        assert rule[at] == plain[at]
    else:
        with pytest.raises(IndexError):
            rule[at]


def test_equal_contents_in_succession_are_written_once(tmp_path, monkeypatch):
    federation, written = InProcessFederation(**FEDAVG), []
    encode = simulation_grid.encode_content
    monkeypatch.setattr(
        simulation_grid, "encode_content", lambda content: written.append(1) or encode(content)
    )
    weights, config = federation.strategy.initial_arrays(), federation.strategy.config
    with simulation(tmp_path, federation) as grid:
        list(
            grid.send_and_receive(
                Message(RecordDict({"arrays": weights, "config": config(round)}), node, "train")
                for round in (1, 2)
                for node in (2, 3, 4)
            )
        )
    assert len(written) == 2


@given(
    arrays.arrays(
        st.sampled_from(["f4", "f8", ">f4", "i8", "u1", "?", "f2"]),
        arrays.array_shapes(min_dims=0, min_side=0),
    ),
    st.booleans(),
)
def test_an_array_is_read_as_flower_reads_it(values, by_columns):
    array = Array(np.asfortranarray(values) if by_columns else values)
    ours, theirs = read_array("a", array), array.numpy()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.flags.writeable
    assert ours.tobytes() == theirs.tobytes()
