"""How logits travel is agreed at join: each client gets the first codec that it knows."""

import numpy as np
import pytest
import test_strategies
from test_strategies import federation, ran

from fedkit.engine.plan import make_plan
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.errors import UsageError
from fedkit.knowledge.codecs import payload_bytes

LITTLE = {"public": "digits:1000", "public_samples": 60, "eval_every": 100}
FEDMD = test_strategies.FEDMD | LITTLE
KTPFL = test_strategies.KTPFL | LITTLE
UNTRAINED = {
    "fedmd": FEDMD | {"init_epochs": 0, "digest_epochs": 0, "revisit_epochs": 0},
    "ktpfl": KTPFL | {"local_epochs": 0, "distill_epochs": 0},
}
BOTH = pytest.mark.parametrize("settings", UNTRAINED.values(), ids=UNTRAINED)
KINDS = {
    "fedmd": ("query.logits", "train.digest"),
    "ktpfl": ("train.local", "train.distill"),
}
CODECS = ["float32", "float16", "int8", "topk:1", "topk:3", "topk:10", "cfd:1", "cfd:4", "cfd:8"]
INDICES = 4 * 60


class Says:
    """A tamper that lets clients say other codecs at join (None: say nothing of them)."""

    def __init__(self, wire, codecs):
        self.wire, self.codecs = wire, codecs

    def __call__(self, instruction, reply):
        kind, client = instruction.metadata.message_type, instruction.metadata.dst_node_id - 2
        if kind == "query.join" and client in self.codecs:
            said = self.codecs[client]
            if said is None:
                del reply.content["join"]["codecs"]
            else:
                reply.content["join"]["codecs"] = said
        return self.wire(instruction, reply)


def negotiated(codecs, change=None, **settings):
    """A run in which clients say what they know: ``{client: codecs}``; all others know all."""
    run, wire = federation(change, **settings)
    run.grid.tamper = Says(wire, codecs)
    run.summary = run.run()
    return run, wire


def bytes_of(run, client):
    found = run.summary["clients"][client]
    return found["bytes_up"], found["bytes_down"]


def asked_for(wire, kind):
    return {
        client: content["config"]["codec"]
        for (of, _, client), content in wire.sent.items()
        if of == kind
    }


@BOTH
@pytest.mark.parametrize("offer", ["topk:3,float32", " topk:3 , float32 "])
def test_each_client_gets_the_first_codec_that_it_knows(settings, offer):
    knows = {1: ["float32"], 2: ["float32", "topk"]}
    run, wire = negotiated(knows, **settings, clients=3, rounds=1, codec=offer)
    wanted = {0: "topk:3", 1: "float32", 2: "topk:3"}
    ask, tell = KINDS[settings["strategy"]]
    assert asked_for(wire, ask) == asked_for(wire, tell) == wanted
    for client, codec in wanted.items():
        size = payload_bytes(codec, 60, 10)
        assert bytes_of(run, client) == (size, size + INDICES)
    assert bytes_of(run, 0) != bytes_of(run, 1)
    assert not run.warnings()


@BOTH
def test_the_order_of_the_offer_decides_and_not_the_clients(settings):
    knows = {client: ["int8", "float32", "float16"] for client in (0, 1)}
    for offer, codec in (("float16,int8", "float16"), ("int8,float16", "int8")):
        _, wire = negotiated(knows, **settings, clients=2, rounds=1, codec=offer)
        assert set(asked_for(wire, KINDS[settings["strategy"]][0]).values()) == {codec}


def test_fused_rounds_keep_to_what_was_agreed():
    settings = UNTRAINED["fedmd"] | {"fuse": True, "codec": "int8,float32"}
    run, wire = negotiated({1: ["float32"]}, **settings, clients=2, rounds=3)
    for round in (1, 2, 3):
        assert wire.sent["train.digest", round, 0]["config"]["codec"] == "int8"
        assert wire.sent["train.digest", round, 1]["config"]["codec"] == "float32"
    for client, codec in enumerate(("int8", "float32")):
        size = payload_bytes(codec, 60, 10)
        assert bytes_of(run, client) == (3 * size, 3 * (size + INDICES))


def test_clients_with_different_codecs_share_one_consensus():
    _, wire = negotiated(
        {1: ["float32"]}, **UNTRAINED["fedmd"], clients=2, rounds=1, codec="float16,float32"
    )
    up, down = wire.up("query.logits", "logits"), wire.down("train.digest", "target")
    assert [up[client]["values"].dtype for client in (0, 1)] == [np.float16, np.float32]
    wanted = (up[0]["values"].astype(np.float64) + up[1]["values"]) / 2
    np.testing.assert_allclose(down[1]["values"], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(down[0]["values"], wanted, rtol=1e-3, atol=1e-6)


def test_an_answer_in_another_codec_than_agreed_is_refused():
    def change(kind, round, client, reply):
        if kind == "query.logits" and client == 1:
            reply.content["logits"]["values"] = type(reply.content["logits"]["values"])(
                np.zeros((60, 10), np.float32)
            )
        return reply

    run, wire = ran(change, **UNTRAINED["fedmd"], clients=2, rounds=1, codec="float16")
    assert any("client 1 (lenet)" in text and "codec float16" in text for text in run.warnings())
    assert sorted(wire.down("train.digest", "target")) == [0]


@BOTH
def test_without_a_common_codec_a_client_is_refused_with_what_it_knows(settings):
    knows = {1: ["float32", "gzip"]}
    offer = {"codec": "int8,topk:3", "min_clients": 2}
    run, wire = negotiated(knows, **settings | offer, clients=3, rounds=1)
    text, *more = run.warnings()
    assert not [text for text in more if "refused" not in text]
    for words in ("a client was refused", "int8,topk:3", "['float32', 'gzip']", "add float32"):
        assert words in text
    assert sorted(asked_for(wire, KINDS[settings["strategy"]][0])) == [0, 2]
    assert [client["id"] for client in run.summary["clients"]] == [0, 2]


@pytest.mark.parametrize(
    "said",
    [
        None,
        "float32",
        [],
        [1, 2],
        [1.5],
        [b"float32"],
        ["float32\n"],
        ["float32", "x" * 101],
        ["float32"] * 101,
    ],
    ids=["none", "text", "empty", "numbers", "floats", "bytes", "unprintable", "long", "many"],
)
def test_malformed_codecs_are_refused_and_the_run_goes_on_with_the_others(said):
    settings = UNTRAINED["fedmd"] | {"min_clients": 2}
    run, _ = negotiated({1: said}, **settings, clients=3, rounds=2)
    assert run.summary["rounds"] == 2
    assert [client["id"] for client in run.summary["clients"]] == [0, 2]
    assert run.warnings()
    assert all("a client was refused" in text for text in run.warnings())


def test_a_client_that_was_mended_joins_later():
    def change(kind, round, client, reply):
        if kind == "evaluate":
            run.grid.tamper.codecs.clear()
        return reply

    settings = UNTRAINED["fedmd"] | {"min_clients": 1, "codec": "int8", "eval_every": 1}
    run, wire = federation(change, **settings, clients=2, rounds=2)
    run.grid.tamper = Says(wire, {1: ["float32"]})
    run.run()
    assert sorted({at[2] for at in wire.sent if at[1] == 1}) == [0]
    assert sorted({at[2] for at in wire.sent if at[1] == 2}) == [0, 1]


# At the door


@pytest.mark.parametrize("codec", ["cfd:1", "cfd:4", "float32,cfd:1", "cfd:8,float32"])
@pytest.mark.parametrize(
    "settings",
    [{"strategy": "fedmd"}, {"strategy": "ktpfl", "space": "logit"}],
    ids=["fedmd", "ktpfl"],
)
def test_codecs_for_probabilities_are_refused_where_raw_scores_travel(settings, codec):
    with pytest.raises(UsageError, match=r"cfd:\d carries probabilities only.*space=prob"):
        make_plan({**settings, "codec": codec}, local=True)
    # Any other way to space=prob is one.
    assert make_plan({**settings, "codec": codec, "space": "prob"}, local=True)


def test_cfd_goes_with_dsfl():
    plan = make_plan({"strategy": "fedmd", "preset": "dsfl", "codec": "cfd:1"}, local=True)
    assert plan.federation.codec == "cfd:1"
    settings = {name: value for name, value in UNTRAINED["fedmd"].items() if name != "space"}
    run, wire = ran(**settings, preset="dsfl", codec="cfd:1", clients=2, rounds=1)
    assert not run.warnings()
    assert bytes_of(run, 0) == (30, 30 + INDICES)
    assert wire.up("query.logits", "logits")[0]["packed"].shape == (30,)


@pytest.mark.parametrize("codec", ["", "zip", "float32,zip", "topk", "topk:0", "cfd:9", "int8:3"])
def test_codecs_that_are_none_are_refused_at_the_door(codec):
    with pytest.raises(UsageError):
        make_plan({"strategy": "ktpfl", "codec": codec}, local=True)


# What was said to travel is what travels


@pytest.mark.parametrize("codec", CODECS)
@BOTH
def test_measured_bytes_are_those_that_the_strategy_tells(settings, codec):
    """Logits up; targets and indices down; whatever the codec."""
    settings = settings | {"space": "prob", "codec": codec}
    run, wire = ran(**settings, clients=2, rounds=1, models="lenet,cnn")
    up, down = run.strategy.traffic(
        run.plan.hyper, Sizes(NetworkSize(0), NetworkSize(0), 10, len(run.view.data.public), codec)
    )
    size = payload_bytes(codec, 60, 10)
    assert (up, down) == (size, size + INDICES)
    for client in (0, 1):
        assert bytes_of(run, client) == (up, down)
    assert not run.warnings()
    ask, tell = KINDS[settings["strategy"]]
    assert sorted(wire.down(tell, "target")) == sorted(wire.up(ask, "logits")) == [0, 1]


@pytest.mark.parametrize("codec", ["float16", "int8", "topk:3"])
@pytest.mark.parametrize(
    "settings",
    [UNTRAINED["fedmd"], UNTRAINED["ktpfl"] | {"space": "logit"}],
    ids=["fedmd", "ktpfl"],
)
def test_raw_scores_travel_in_every_codec_that_carries_them(settings, codec):
    run, _ = ran(**settings, codec=codec, clients=2, rounds=1)
    size = payload_bytes(codec, 60, 10)
    assert bytes_of(run, 1) == (size, size + INDICES)
    assert not run.warnings()
