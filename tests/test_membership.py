"""A client's part in a federation: each instruction is done once, whatever is killed in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedkit.engine import membership as membership_module
from fedkit.engine.client import Client, ClientPlan
from fedkit.engine.membership import Membership
from fedkit.engine.state import StateDirectory
from fedkit.errors import FedkitError
from fedkit.flower import decode_message, encode_message, set_message_id, take_identity
from fedkit.link.client import Answer
from fedkit.settings import DataSettings

WELCOME: dict[str, Any] = {
    "federation": "f00d",
    "node_id": 7,
    "node_config": {"partition-id": 3, "num-partitions": 4},
    "run_config": {"model": "lenet", "strategy": "counting", "rounds": 5},
}


class Counting:
    """An app whose model counts how often it was trained."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        import numpy as np

        self.done.append(message.metadata.message_id)
        if message.metadata.message_type == "train":
            before = context.state.array_records.get("own-model")
            count = 0.0 if before is None else float(before["count"].numpy())
            context.state["own-model"] = ArrayRecord({"count": Array(np.array(count + 1))})
        told = MetricRecord({"done": len(self.done)})
        return Message(RecordDict({"metrics": told}), reply_to=message)


@pytest.fixture
def app(monkeypatch) -> Counting:
    one = Counting()
    monkeypatch.setattr(membership_module, "load", lambda kind, name: one)
    return one


@pytest.fixture
def folder(tmp_path: Path):
    directory = StateDirectory(tmp_path)
    yield directory
    directory.close()


def opened(folder: StateDirectory, **changes: Any) -> Membership:
    return Membership(folder, {**WELCOME, **changes}, None, {"device": "cpu"})


def work(one: Membership, key: str, round: int, kind: str = "train") -> Answer:
    take_identity()
    message = Message(RecordDict(), 7, kind, group_id=str(round))
    set_message_id(message, key)
    return one.work(key, encode_message(message))


def told(answer: Answer) -> Any:
    return decode_message(list(answer.buffers)).content.metric_records["metrics"]["done"]


def trained(folder: StateDirectory) -> float:
    """What the model on disk says, as a process that comes after would read it."""
    from fedkit.engine.saved import kept_model

    return float(kept_model(folder.path / "f00d").arrays["count"])


@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "restarted"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_instruction_that_comes_again_is_answered_and_not_done(app, folder, kind, restarted):
    one = opened(folder)
    first = work(one, "a", 1, kind)
    again = work(opened(folder) if restarted else one, "a", 1, kind)
    assert app.done == ["a"]
    assert [bytes(part) for part in again.buffers] == [bytes(part) for part in first.buffers]


def test_the_answers_of_the_round_before_are_still_there(app, folder):
    one = opened(folder)
    for round in (1, 2):
        work(one, f"train {round}", round)
        work(one, f"digest {round}", round)
    later = opened(folder)
    assert [
        told(work(later, f"{kind} {round}", round))
        for round in (1, 2)
        for kind in ("train", "digest")
    ] == [1, 2, 3, 4]
    assert len(app.done) == 4


def test_a_round_left_behind_is_refused_and_the_model_stays(app, folder):
    """A server that lost its checkpoints would have it train again on a model that has gone on."""
    one = opened(folder)
    for round in (1, 2, 3):
        work(one, f"t{round}", round)
    before = trained(folder)
    answer = work(one, "t1", 1)
    assert isinstance(answer.fatal, FedkitError) and "round 3" in str(answer.fatal)
    assert decode_message(list(answer.buffers)).has_error()
    assert trained(folder) == before == 3.0
    assert told(work(one, "t2", 2)) == 2  # from memory
    assert told(work(one, "t4", 4)) == 4  # and on it goes


def test_an_instruction_that_cannot_be_read_ends_the_client_with_a_sentence(app, folder):
    with pytest.raises(FedkitError, match="not a Flower message"):
        opened(folder).work("k", [b"\xff\xff garbage"])
    assert app.done == []


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"notice": "something else"}, True),
        ({"run_config": {**WELCOME["run_config"], "rounds": 9}}, False),
        ({"node_config": {"partition-id": 2, "num-partitions": 4}}, False),
        ({"node_id": 8}, False),
    ],
)
def test_a_part_fits_while_the_server_says_the_same(folder, changes, fits):
    assert opened(folder).fits({**WELCOME, **changes}) is fits


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 65, "ünïcode", 7.5])
def test_a_federation_that_is_no_plain_word_makes_no_folder(folder, name):
    with pytest.raises(FedkitError, match="no plain word"):
        opened(folder, federation=name)


def plan_for(server: str, folder: Path, **more: Any) -> ClientPlan:
    return ClientPlan(
        server=server,
        state_dir=folder,
        shard=0,
        own_dataset=None,
        memory_budget=0,
        model=None,
        device="cpu",
        expected={},
        data=DataSettings(),
        **more,
    )


def test_a_welcome_that_makes_no_sense_is_a_sentence(served, tmp_path):
    """It says nothing of a shard."""
    with pytest.raises(FedkitError, match=r"makes no sense.*node_config"):
        Client(plan_for(served.address, tmp_path)).run()


def test_a_damaged_identity_is_not_waited_out(tmp_path):
    """However long a client is to stay."""
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(FedkitError, match=r"identity\.json is damaged"):
        Client(plan_for("127.0.0.1:1", tmp_path, stay=True)).run()
