"""Settings: declared once, read from anywhere, refused with a sentence."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedkit.cli.options import describe
from fedkit.engine.plan import LOCAL_DEFAULTS, client_models, make_plan
from fedkit.engine.strategy import build_hyperparameters
from fedkit.errors import UsageError
from fedkit.registry import all_names, load
from fedkit.rundir import RunDirectory
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    RunSettings,
    ServerSettings,
    as_config,
    build,
    default_of,
    key,
    merge,
    read_overrides,
    read_toml,
    refuse_unknown,
    setting,
)

GROUPS = (FederationSettings, ServerSettings, DataSettings, RunSettings)
STRATEGIES = all_names("strategies")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@dataclass(frozen=True)
class Sample:
    """One setting of each kind."""

    a_count: int = setting(3, "a whole number", minimum=1, maximum=9)
    a_rate: float = setting(0.5, "a number", above=0, maximum=2)
    a_switch: bool = setting(False, "a switch")
    a_choice: str = setting("one", "a choice", choices=("one", "two"))
    a_text: str = setting("", "a text")


def built(**values: Any) -> Sample:
    return build(Sample, merge(values))


# Reading one value.


def test_what_is_not_given_has_its_default():
    assert build(Sample, {}) == Sample()
    assert built(a_count=4) == replace(Sample(), a_count=4)


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("a-count", "7", 7),
        ("a-count", 7, 7),
        ("a-count", 7.0, 7),
        ("a-count", " 7 ", 7),
        ("a-rate", "1.5", 1.5),
        ("a-rate", "1e-3", 0.001),
        ("a-rate", 1, 1.0),
        ("a-switch", True, True),
        ("a-switch", "true", True),
        ("a-switch", "Yes", True),
        ("a-switch", "on", True),
        ("a-switch", "1", True),
        ("a-switch", "FALSE", False),
        ("a-switch", "no", False),
        ("a-switch", "off", False),
        ("a-switch", "0", False),
        ("a-choice", "two", "two"),
        ("a-text", "any text: at all", "any text: at all"),
        ("a-text", "", ""),
        ("a-text", 5, "5"),
    ],
)
def test_a_value_is_read_from_text_and_from_toml(name, given, read):
    value = getattr(build(Sample, {name: given}), name.replace("-", "_"))
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("a-count", "seven", "a whole number"),
        ("a-count", "", "a whole number"),
        ("a-count", "1.5", "a whole number"),
        ("a-count", 1.5, "a whole number"),
        ("a-count", True, "a whole number"),
        ("a-count", float("inf"), "a whole number"),
        ("a-count", float("nan"), "a whole number"),
        ("a-count", "9" * 5000, "a-count"),
        ("a-count", 0, "at least 1"),
        ("a-count", "-1", "at least 1"),
        ("a-count", 10, "at most 9"),
        ("a-rate", "much", "a number"),
        ("a-rate", False, "a number"),
        ("a-rate", 0, "above 0"),
        ("a-rate", "-0.0", "above 0"),
        ("a-rate", 2.01, "at most 2"),
        ("a-rate", "nan", "not nan"),
        ("a-rate", float("nan"), "not nan"),
        ("a-rate", "inf", "at most 2"),
        ("a-rate", "-inf", "above 0"),
        ("a-switch", "maybe", "true or false"),
        ("a-switch", 2, "true or false"),
        ("a-switch", "", "true or false"),
        ("a-choice", "three", "one, two"),
        ("a-choice", "", "one, two"),
        ("a-choice", "One", "one, two"),
    ],
)
def test_a_bad_value_is_a_usage_error_that_names_the_setting(name, given, words):
    with pytest.raises(UsageError, match=name) as caught:
        build(Sample, {name: given})
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.sampled_from(sorted(as_config(Sample()))), st.text() | st.integers() | st.floats())
def test_any_value_is_taken_or_refused_with_a_sentence(name, given):
    try:
        value = getattr(build(Sample, {name: given}), name.replace("-", "_"))
    except UsageError as error:
        assert name in str(error)
    else:
        assert value == value


@pytest.mark.parametrize("seconds", ["inf", 1e300])
def test_a_timeout_that_no_clock_can_count_to_is_refused(seconds):
    """``threading`` refuses to wait so long: the server would fail after everybody joined."""
    with pytest.raises(UsageError, match="round-timeout"):
        build(FederationSettings, {"round-timeout": seconds})


@pytest.mark.parametrize(
    ("strategy", "name"), [("fedavg", "learning-rate"), ("ktpfl", "temperature")]
)
def test_an_infinite_hyperparameter_is_refused(strategy, name):
    with pytest.raises(UsageError, match=name):
        make_plan({"strategy": strategy, name: "inf"})


# Names.


def test_kebab_and_snake_are_one_name():
    assert merge({"num_shards": 3}, {"num-shards": 4}) == {"num-shards": 4}
    assert merge({"num-shards": 3}, {"num_shards": 4}) == {"num-shards": 4}
    assert make_plan({"num_shards": 7}) == make_plan({"num-shards": "7"})


def test_later_layers_win():
    assert merge({"seed": 1, "rounds": 2}, {"seed": 3}, {}) == {"seed": 3, "rounds": 2}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("round", "rounds"),
        ("num-shard", "num-shards"),
        ("local-epoch", "local-epochs"),
        ("temprature", "temperature"),
        ("lisen", "listen"),
        ("data-rot", "data-root"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(UsageError, match=rf"'{name}'.*did you mean.*{nearest}"):
        make_plan({name: 1})


def test_a_name_like_nothing_lists_what_there_is():
    with pytest.raises(UsageError, match=r"there is: .*a-count"):
        refuse_unknown({"qqqqqqq": 1}, [Sample])


def test_hyperparameters_of_another_strategy_are_unknown():
    with pytest.raises(UsageError, match="digest-epochs"):
        make_plan({"strategy": "ktpfl", "digest-epochs": 2})
    assert make_plan({"strategy": "fedmd", "digest-epochs": 2}).hyper.digest_epochs == 2


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("strategy", "fedav", "fedavg"),
        ("dataset", "digit", "digits"),
        ("partition", "dirichle:0.5", "dirichlet"),
        ("model", "lenett", "lenet"),
        ("models", "lenet,resnet-18", "resnet18"),
        ("select", "unifrom:0.1", "uniform"),
        ("codec", "float-16", "float16"),
        ("public", "digts:100", "digits"),
    ],
)
def test_an_unknown_value_suggests_the_nearest(name, value, nearest):
    with pytest.raises(UsageError, match=rf"There is no .*did you mean.*{nearest}"):
        make_plan({name: value}, local=True)


@pytest.mark.parametrize("value", ["digits", "digits:", "digits:many", "digits:1.5", ""])
def test_a_public_set_without_a_count_is_refused(value):
    with pytest.raises(UsageError, match="public"):
        make_plan({"public": value})


@pytest.mark.parametrize("value", ["", "8090", "localhost", ":8090", "host:", "host:99999", "h:x"])
def test_an_address_to_listen_on_has_a_host_and_a_port(value):
    with pytest.raises(UsageError, match="HOST:PORT"):
        make_plan({"listen": value})


@pytest.mark.parametrize("value", ["uniform", "uniform:x", "uniform:0", "uniform:1.5", "all:3"])
def test_a_selectors_argument_is_refused_before_anything_starts(value):
    with pytest.raises(UsageError, match=r"uniform|all"):
        make_plan({"select": value})


@pytest.mark.parametrize(("name", "value"), [("codec", "float32:3"), ("dataset", "digits:3")])
def test_an_argument_to_what_takes_none_is_refused_before_anything_starts(name, value):
    with pytest.raises(UsageError, match="takes no argument"):
        make_plan({name: value})


# Declarations.


@every_strategy
def test_hyperparameters_never_clash_with_settings(strategy):
    own = {item.name for item in fields(load("strategies", strategy).Hyperparameters)}
    taken = {item.name for group in GROUPS for item in fields(group)}
    assert not own & taken


def test_groups_of_settings_never_clash():
    declared = [item.name for group in GROUPS for item in fields(group)]
    assert len(declared) == len(set(declared))


@pytest.mark.parametrize(
    "group", [*GROUPS, *(load("strategies", strategy).Hyperparameters for strategy in STRATEGIES)]
)
def test_every_setting_has_help_and_a_default_that_it_accepts(group):
    for item in fields(group):
        assert len(item.metadata["help"]) > 5
        assert not item.metadata["help"].endswith(".")
        assert describe(item)
        built_from_text = build(group, {key(item.name): str(default_of(item))})
        assert built_from_text == group()


@every_strategy
def test_presets_name_only_settings_that_exist_and_pass(strategy):
    kind = load("strategies", strategy)
    known = {
        key(item.name)
        for group in (kind.Hyperparameters, FederationSettings)
        for item in fields(group)
    }
    assert "default" in kind.PRESETS
    choices = {item.name: item.metadata["choices"] for item in fields(kind.Hyperparameters)}
    assert set(choices["preset"]) == set(kind.PRESETS)
    for name, values in kind.PRESETS.items():
        assert not set(values) - known
        assert make_plan({"strategy": strategy, "preset": name}).hyper.preset == name


# Presets.


def test_a_preset_beats_the_default_and_an_explicit_value_beats_the_preset():
    assert make_plan({"strategy": "fedmd"}).hyper.digest_batch == 64
    paper = {"strategy": "fedmd", "preset": "paper"}
    assert make_plan(paper).hyper.digest_batch == 256
    assert make_plan({**paper, "digest-batch": "32"}).hyper.digest_batch == 32
    # A value that equals the default is explicit all the same.
    assert make_plan({**paper, "digest_batch": 64}).hyper.digest_batch == 64


def test_build_hyperparameters_leaves_foreign_names_alone():
    kind = load("strategies", "fedavg")
    assert build_hyperparameters(kind, {"rounds": 5, "local-epochs": 2}).local_epochs == 2


def test_a_preset_implies_federation_settings():
    assert make_plan({"strategy": "fedavg"}).federation.select == "all"
    paper = {"strategy": "fedavg", "preset": "paper"}
    assert make_plan(paper).federation.select == "uniform:0.1"
    assert make_plan(paper, local=True).federation.select == "uniform:0.1"
    assert make_plan({**paper, "select": "all"}).federation.select == "all"
    code = make_plan({"strategy": "fedmd", "preset": "code"})
    assert code.federation.public_labels and code.hyper.stratified


def test_settings_that_contradict_each_other_are_refused():
    contradiction = {"strategy": "fedmd", "preset": "code", "public-labels": False}
    with pytest.raises(UsageError, match="stratified"):
        make_plan(contradiction)
    assert make_plan({**contradiction, "stratified": False}).hyper.preset == "code"


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(UsageError, match="preset must be one of default, paper"):
        make_plan({"strategy": "fedavg", "preset": "papers"})


# Local runs.


def test_a_local_run_has_defaults_of_its_own():
    plan = make_plan({"clients": 3}, local=True).federation
    assert (plan.num_shards, plan.min_clients) == (3, 3)
    assert (plan.alone, plan.rounds) == (LOCAL_DEFAULTS["alone"], LOCAL_DEFAULTS["rounds"])
    explicit = {"clients": 3, "num-shards": 5, "min-clients": 2, "alone": "no", "rounds": 4}
    plan = make_plan(explicit, local=True).federation
    assert (plan.num_shards, plan.min_clients, plan.alone, plan.rounds) == (5, 2, False, 4)


def test_a_local_run_that_could_never_begin_is_refused():
    with pytest.raises(UsageError, match="clients"):
        make_plan({"clients": 4, "min-clients": 5}, local=True)


def test_models_are_cycled_over_clients():
    plan = make_plan({"clients": 5, "models": "lenet, cnn,"}, local=True)
    assert client_models(plan) == ["lenet", "cnn", "lenet", "cnn", "lenet"]
    one = make_plan({"strategy": "fedavg", "model": "cnn", "clients": 2}, local=True)
    assert client_models(one) == ["cnn", "cnn"]


@pytest.mark.parametrize("models", ["", ",", " , "])
def test_no_model_at_all_is_refused(models):
    with pytest.raises(UsageError, match="models"):
        client_models(make_plan({"models": models}, local=True))


# Files and -o.


def test_toml_values_keep_their_types(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('rounds = 3\nval-fraction = 0.25\nalone = true\nstrategy = "fedmd"\n')
    values = read_toml(str(file))
    assert values == {"rounds": 3, "val-fraction": 0.25, "alone": True, "strategy": "fedmd"}
    plan = make_plan(values).federation
    assert (plan.rounds, plan.val_fraction, plan.alone) == (3, 0.25, True)


def test_toml_takes_python_spelling_too(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("num_shards = 3\n")
    assert make_plan(read_toml(str(file))).federation.num_shards == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = ", "can't be read"),
        ("rounds 3", "can't be read"),
        ("rounds = 3\nrounds = 4", "can't be read"),
        ("[federation]\nrounds = 3", "federation"),
        ("models = ['lenet', 'cnn']", "models"),
        ("seed = 2026-11-21", "seed"),
    ],
)
def test_a_settings_file_that_is_wrong_is_a_usage_error_with_its_name(tmp_path, text, words):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"wrong\.toml") as caught:
        read_toml(str(file))
    assert words in str(caught.value)


def test_a_settings_file_that_is_no_text_is_a_usage_error(tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"wrong\.toml"):
        read_toml(str(file))
    with pytest.raises(UsageError, match="can't be read"):
        read_toml(str(tmp_path))
    with pytest.raises(UsageError, match="There is no settings file"):
        read_toml(str(tmp_path / "none.toml"))


def test_overrides_are_key_and_value():
    assert read_overrides(["a=1", "b = x=y ", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    assert read_overrides(["a=1", "a=2"]) == {"a": "2"}


@pytest.mark.parametrize("pair", ["", "rounds", "=5", "="])
def test_an_override_that_is_none_is_refused(pair):
    with pytest.raises(UsageError, match="key=value"):
        read_overrides([pair])


def samples() -> list[dict[str, Any]]:
    plain = [{"strategy": strategy} for strategy in STRATEGIES]
    presets = [
        {"strategy": strategy, "preset": preset}
        for strategy in STRATEGIES
        for preset in load("strategies", strategy).PRESETS
    ]
    special = {
        "strategy": "fedmd",
        "preset": "paper",
        "clients": 3,
        "models": "lenet:group,cnn",
        "learning-rate": 0.1 + 0.2,
        "round-timeout": "1e-3",
        "seed": 2**62,
        "public": "digits:123",
        "data-root": 'with "quotes" and ü\n',
        "stratified": False,
        "eval-samples": 5,
    }
    return [*plain, *presets, special]


@pytest.mark.parametrize("values", samples(), ids=lambda values: "-".join(map(str, values)))
def test_a_plan_comes_back_from_its_own_values_and_from_config_toml(tmp_path, values):
    plan = make_plan(values, local=True)
    assert make_plan(plan.values(), local=True) == plan
    assert make_plan(tomllib.loads(tomli_w.dumps(plan.values())), local=True) == plan
    RunDirectory(tmp_path / "run").write_config(plan.values())
    assert make_plan(read_toml(str(tmp_path / "run" / "config.toml")), local=True) == plan


def test_auto_is_spelled_out_in_the_plan():
    assert make_plan({"public": "auto"}).values()["public"] == "digits:400"
    assert make_plan({"dataset": "mnist"}).values()["public"] == "mnist:5000"


def test_as_config_is_plain_values_by_outside_name():
    config = as_config(FederationSettings())
    assert config["num-shards"] == 20
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert build(FederationSettings, config) == FederationSettings()
