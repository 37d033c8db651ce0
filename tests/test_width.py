"""At which width a device trains: as told, or as wide as memory and time allow; and files of one width."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation
from typer.testing import CliRunner

from clients import fitting
from clients.edge import edge_of, memory_needed
from fedkit.cli import export as export_command
from fedkit.data.splits import cut
from fedkit.engine.local_clients import local_clients
from fedkit.engine.plan import make_plan
from fedkit.engine.saved import Found, at_width, models_of
from fedkit.errors import FedkitError, UsageError
from fedkit.models.budget import read_width
from fedkit.models.build import build_model
from fedkit.models.export import narrowed
from fedkit.models.files import about_of, load_model, network, save_model
from fedkit.models.slicing import slicing_of
from fedkit.settings import DataSettings

app = typer.Typer()
export_command.register(app)
SMALL = {
    "strategy": "heterofl",
    "model": "cnn",
    "levels": "1,0.5,0.25",
    "clients": 2,
    "rounds": 1,
    "local_epochs": 1,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 12,
    "alone": False,
    "eval_samples": 20,
}
NAMES = ("cnn", "width:0.5:cnn", "width:0.25:cnn")
SHAPE = (1, 8, 8)


def federation(widths: str, **settings) -> InProcessFederation:
    return InProcessFederation(**{**SMALL, "widths": widths, **settings})


@pytest.fixture
def timed(monkeypatch):
    """A clock that says of each network that it takes ten seconds for its whole width."""
    seconds = dict(zip(NAMES, (10.0, 5.0, 2.5), strict=True))
    asked: list[str] = []

    def look(edge, context, spec, loss):
        asked.append(spec)
        return seconds[spec]

    monkeypatch.setattr(fitting, "_seconds", look)
    return asked


def join(run: InProcessFederation, client: int):
    """What that client's edge is once it has been asked to join."""
    run.driver.roster.admit()
    run.driver.roster.admit()
    return edge_of(run.context(client))


@pytest.mark.parametrize(("budget", "width"), [(0, 1.0), (10, 1.0), (9.9, 0.5), (2.5, 0.25)])
def test_auto_takes_the_widest_level_within_the_time_budget(timed, budget, width):
    run = federation("auto,1", time_budgets=f"{budget},0")
    assert join(run, 0).width == width
    assert timed == list(NAMES[: len(timed)])
    (member, other) = run.driver.roster.connected()
    assert (member.width, other.width) == (width, 1.0)
    assert f"{10 * width:g} s a round" in member.fit
    joined = [str(event.name) for event in run.events if event.event == "join"]
    assert any(f"which takes {member.fit}" in text for text in joined)


def test_auto_takes_the_widest_level_within_the_memory_budget(timed):
    known = federation("1,1")
    edge = join(known, 0)
    needed = [memory_needed(edge, known.context(0), spec) for spec in NAMES]
    assert needed[0] > needed[1] > needed[2]
    for width, budget in zip((1.0, 0.5, 0.25), needed, strict=True):
        run = federation("auto,1")
        run.context(0).node_config["memory-budget"] = budget
        assert join(run, 0).width == width
    run = federation("auto,1")
    run.context(0).node_config["memory-budget"] = needed[2] - 1
    with pytest.raises(FedkitError, match=r"Nothing of cnn fits .* \(width:0.25:cnn needs"):
        join(run, 0)


def test_a_width_once_found_is_kept_when_the_clock_says_otherwise(timed, monkeypatch):
    run = federation("auto,1", time_budgets="5,0")
    context = run.context(0)
    assert join(run, 0).width == 0.5
    del context._fedkit_edge
    monkeypatch.setattr(fitting, "_seconds", lambda *given: 1000.0)
    edge = edge_of(context)
    assert (edge.width, edge.model_name) == (0.5, "width:0.5:cnn")
    del context._fedkit_edge
    context.node_config["width"] = "0.25"
    with pytest.raises(UsageError, match=r"has trained at width 0.5 .* give --width 0.5"):
        edge_of(context)


def test_what_a_round_takes_is_measured_and_leaves_no_trace():
    run = federation("1,1")
    edge, context = join(run, 0), run.context(0)
    before = torch.random.get_rng_state()
    seconds = fitting._seconds(edge, context, "width:0.25:cnn", torch.nn.functional.cross_entropy)
    assert 0 < seconds < math.inf
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("told", "width"), [("0.3", 0.25), ("0.5", 0.5), ("0.9", 0.5)])
def test_a_width_between_levels_is_the_narrower_one(told, width):
    run = federation(f"{told},1")
    edge = join(run, 0)
    assert edge.width == width
    shapes = {name: tensor.shape for name, tensor in edge.own.state_dict().items()}
    narrow = slicing_of("cnn", SHAPE, 10).network(width).state_dict()
    assert shapes == {name: tensor.shape for name, tensor in narrow.items()}


def test_a_federation_of_widths_trains_and_says_who_is_how_wide(timed):
    run = federation("0.25,auto", time_budgets="0,5")
    summary = run.run()
    assert [member.width for member in run.driver.roster.connected()] == [0.25, 0.5]
    assert summary["status"] == "completed"


@pytest.mark.parametrize("option", ["width", "depth"])
def test_a_part_of_a_network_is_refused_where_all_train_the_whole(option):
    settings = {name: value for name, value in SMALL.items() if name != "levels"}
    run = InProcessFederation(**{**settings, "strategy": "fedavg"})
    run.context(0).node_config[option] = "1"
    with pytest.raises(UsageError, match=f"--{option} goes with the strategy"):
        join(run, 0)


def test_local_widths_go_round_the_clients_and_with_heterofl_alone():
    plan = make_plan({**SMALL, "clients": 3, "widths": "1,0.25"}, local=True)
    assert [one.width for one in local_clients(plan)] == ["1", "0.25", "1"]
    with pytest.raises(UsageError, match="widths go with"):
        make_plan({"strategy": "fedavg", "widths": "1,0.25"}, local=True)
    with pytest.raises(
        UsageError, match="A width is a number above 0 and up to 1, or auto, not '2'"
    ):
        make_plan({**SMALL, "widths": "1,2"}, local=True)
    for option in ("widths", "depths", "time_budgets"):
        strategy = "depthfl" if option == "depths" else "heterofl"
        with pytest.raises(UsageError, match="not ''"):
            make_plan({"strategy": strategy, "model": "lenet", option: "1,,1"}, local=True)


def test_widths_of_widths_end_before_they_cost_anything():
    assert build_model("width:0.5:width:0.5:cnn", (1, 8, 8), 10, seed=1)
    with pytest.raises(UsageError, match="a width of a width of a width"):
        build_model("width:0.5:" * 9 + "cnn", (1, 8, 8), 10, seed=1)


@given(st.text(max_size=8) | st.floats().map(str))
def test_a_width_is_a_share_or_auto(text):
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if text == "auto" or 0 < share <= 1:
        assert read_width(text) == text
    else:
        with pytest.raises(UsageError, match="A width is a number above 0"):
            read_width(text)


# Files


@pytest.fixture(scope="module")
def data():
    return cut(make_plan({**SMALL, "widths": "1"}, local=True).federation, DataSettings())


def saved_as(file, data, spec):
    model = build_model(spec, SHAPE, 10, seed=3)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_model(file, arrays, about_of(data, spec, round=4))
    return load_model(file)


@pytest.mark.parametrize("spec", ["cnn", "width:0.5:cnn", "lenet"])
def test_a_saved_network_is_cut_to_a_width_that_others_can_read(tmp_path, data, spec):
    saved = saved_as(tmp_path / "global.safetensors", data, spec)
    whole = spec.rpartition(":")[2]
    part = narrowed(saved, 0.25)
    assert part.about.architecture == f"width:0.25:{whole}"
    save_model(tmp_path / "part.safetensors", part.arrays, part.about)
    model = network(load_model(tmp_path / "part.safetensors"))
    wide = network(saved).state_dict()
    for name, tensor in model.state_dict().items():
        prefix = tuple(slice(size) for size in tensor.shape)
        assert torch.equal(tensor, wide[name][prefix])
    assert narrowed(part, 0.25) is part
    with pytest.raises(UsageError, match=r"up to 0.25, not to 0.5"):
        narrowed(part, 0.5)


def test_a_network_with_statistics_of_another_width_is_not_cut(tmp_path, data):
    saved = saved_as(tmp_path / "global.safetensors", data, "lenet:batch")
    with pytest.raises(
        UsageError, match=r"no statistics of the width 0.25 .* 1.num_batches_tracked"
    ):
        narrowed(saved, 0.25)


@pytest.mark.parametrize(
    "suffix", ["safetensors", "pt", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_export_takes_the_runs_own_level_and_else_cuts(tmp_path, data, suffix):
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    (run / "config.toml").write_text("")
    wide = saved_as(run / "models" / "global.safetensors", data, "cnn")
    saved_as(run / "models" / "global-0.5.safetensors", data, "width:0.5:cnn")
    assert [found.label for found in models_of(run)] == ["global-0.5", "global"]
    for width in ("0.5", "0.25"):
        file = tmp_path / f"{width}.{suffix}"
        words = [str(run), "--width", width, "--out", str(file)]
        told = CliRunner().invoke(app, words, catch_exceptions=False)
        assert told.exit_code == 0 and file.exists()
    if suffix == "safetensors":
        own = load_model(run / "models" / "global-0.5.safetensors")
        found = load_model(tmp_path / "0.5.safetensors")
        assert all((found.arrays[n] == own.arrays[n]).all() for n in own.arrays)
        part = load_model(tmp_path / "0.25.safetensors")
        np.testing.assert_array_equal(part.arrays["0.weight"], wide.arrays["0.weight"][:8])


def test_a_level_of_a_level_is_the_runs_own_too():
    found = [Found(label, lambda: None) for label in ("global", "global-0.5", "global-0.25", "x-1")]
    wanted = {
        (None, 0.25): "global-0.25",
        ("global", 0.5): "global-0.5",
        ("global-0.5", 0.25): "global-0.25",
        ("global-0.5", 0.125): "global-0.5",  # to be cut from it
        ("global-0.25", 0.5): "global-0.25",  # which is refused
        ("x-1", 0.5): "x-1",
        ("global-0.5.5", 0.25): "global-0.5.5",
    }
    for (label, width), one in wanted.items():
        assert at_width(found, label, width) == one


def test_a_width_that_cannot_be_built_is_a_sentence(data):
    with pytest.raises(UsageError, match="groups don't divide"):
        build_model("width:0.5:lenet:group", SHAPE, 10, seed=1)
    with pytest.raises(UsageError, match="takes a width above 0 and up to 1 and a network's name"):
        build_model("width:2:lenet", SHAPE, 10, seed=1)


def test_a_narrow_network_by_name_starts_as_the_part_of_the_whole_one():
    whole = build_model("cnn", SHAPE, 10, seed=1).state_dict()
    with torch.device("meta"):
        planned = build_model("width:0.25:cnn", SHAPE, 10, seed=1).state_dict()
    for name, tensor in build_model("width:0.25:cnn", SHAPE, 10, seed=1).state_dict().items():
        assert planned[name].shape == tensor.shape
        assert torch.equal(tensor, whole[name][tuple(slice(size) for size in tensor.shape)])
