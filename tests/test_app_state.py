"""What a Flower App's client keeps: its context's state, and its answers."""

from __future__ import annotations

import logging

import pytest
from flower_apps import counting, quickstart
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkit.apps.membership import AppMembership
from fedkit.engine.state import FederationState, StateDirectory
from fedkit.errors import FedkitError
from fedkit.flower import decode_message, encode_message, take_identity


@pytest.fixture(autouse=True)
def identity():
    yield
    take_identity()


def welcome(federation="f00d", **more):
    return {"federation": federation, "node_id": 5, "run_config": {"lr": 0.1}, **more}


class Member:
    """A client of ``counting``, which is told messages by hand."""

    def __init__(self, folder, app=None, said=None):
        self.directory = StateDirectory(folder)
        one = app or counting()
        self.part = AppMembership(self.directory, said or welcome(), quickstart(), one, {})

    def ask(self, key, **config):
        sent = Message(RecordDict({"config": ConfigRecord(config)}), 5, "train")
        answer = self.part.work(key, encode_message(sent))
        assert answer.fatal is None
        return decode_message(answer.buffers)

    def die(self):
        """As ``kill -9`` does: nothing more is written."""
        self.directory.close()


@pytest.fixture
def folder(tmp_path):
    take_identity()
    return tmp_path / "state"


def test_the_state_outlives_the_process_and_an_answer_is_never_made_twice(folder):
    first = Member(folder)
    assert [first.ask(f"k{n}").content["metrics"]["n"] for n in (1, 2)] == [1, 2]
    failed = first.ask("k3", fail="raise")
    first.die()
    again = Member(folder)
    # The server asks for what it did not get.
    assert again.ask("k2").content["metrics"]["n"] == 2
    assert again.ask("k3").error.reason == failed.error.reason
    assert again.ask("k4").content["metrics"]["n"] == 4


def test_records_that_are_edited_in_place_are_kept(folder):
    app = ClientApp()

    @app.train()
    def train(message, context):
        state = context.state
        if "model" not in state:
            state["model"] = ArrayRecord({"w": Array("", (), "own", b"0")})
            state["told"] = ConfigRecord({"words": []})
        number = str(message.content["config"]["number"])
        state["model"]["w"] = Array("", (), "own", number.encode())
        state["told"]["words"].append(number)
        content = RecordDict({"told": ConfigRecord({"all": [*state["told"]["words"]]})})
        return Message(content, reply_to=message)

    for number in (1, 2, 3):
        member = Member(folder, app)
        told = member.ask(f"k{number}", number=number).content["told"]["all"]
        assert told == [str(n) for n in range(1, number + 1)]
        member.die()
    kept = FederationState(folder / "f00d", None)
    assert kept.record("model")["w"].data == b"3"
    assert list(kept.files) == ["model", "told"]


def instruction():
    return encode_message(Message(RecordDict({"config": ConfigRecord()}), 5, "train"))


def answering(what):
    app = ClientApp()
    app.train()(what)
    return app


def test_state_that_can_t_be_kept_ends_the_client_and_the_server_hears_of_it(folder):
    def spoil(message, context):
        context.state["told"] = ConfigRecord({"words": ["a"]})
        context.state["told"]["words"].append(3)
        return Message(RecordDict(), reply_to=message)

    answer = Member(folder, answering(spoil)).part.work("k1", instruction())
    assert "failed with TypeError" in str(answer.fatal)
    assert decode_message(answer.buffers).error.reason == str(answer.fatal)


def test_damage_to_what_was_kept_ends_the_client_and_the_server_hears_of_it(folder):
    """At the first message, so that `--stay` does not go on with it for ever."""
    first = Member(folder)
    first.ask("k1")
    first.die()
    (kept,) = (folder / "f00d").glob("*.records")
    kept.write_bytes(b"")
    answer = Member(folder).part.work("k2", instruction())
    assert "its checksum is wrong" in str(answer.fatal)
    assert decode_message(answer.buffers).error.reason == str(answer.fatal)


def test_an_error_in_words_that_are_no_text_is_told(folder, monkeypatch):
    """As of a file whose name is no UTF-8."""
    # What pytest captures of a log must be text.
    monkeypatch.setattr(logging.getLogger("fedkit.apps.membership"), "disabled", True)

    def fail(message, context):
        raise FileNotFoundError("pictures/\udce9.png")

    answer = Member(folder, answering(fail)).part.work("k1", instruction())
    assert answer.fatal is None
    assert "pictures/?.png" in decode_message(answer.buffers).error.reason


def test_each_run_has_a_state_of_its_own(folder):
    one = Member(folder)
    one.ask("k1")
    one.die()
    assert Member(folder, said=welcome("beef")).ask("k1").content["metrics"]["n"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"federation": "../up"}, "no plain word"),
        ({"federation": "xyz"}, "no hexadecimal number"),
        ({"run_config": None}, "no run config"),
        ({"run_config": {"a": [1]}}, "no plain value for 'a'"),
    ],
)
def test_a_welcome_that_makes_no_sense_is_refused(folder, change, sentence):
    with pytest.raises(FedkitError, match=sentence):
        Member(folder, said=welcome(**change))
