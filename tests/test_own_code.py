"""Code of the user's own: imported if this process's command line named it, and never otherwise."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from fedkit import registry
from fedkit.data.splits import cut
from fedkit.engine.membership import explain
from fedkit.engine.plan import client_models, make_plan, named_here
from fedkit.errors import FedkitError, UsageError, is_out_of_memory
from fedkit.models.build import build_model
from fedkit.models.pretrained import from_scratch
from fedkit.settings import DataSettings, build

SHAPE = (1, 8, 8)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Write a module into a folder that is the current one; nothing is allowed yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_allowed", set())
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


LINEAR = """
    from torch import nn
    def make(shape, classes, width="3"):
        flat = shape[0] * shape[1] * shape[2]
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, int(width)), nn.Linear(int(width), classes))
"""


def test_what_the_command_line_did_not_name_is_not_imported(code):
    code("own_a", "open('imported', 'w')\n" + textwrap.dedent(LINEAR))
    with pytest.raises(UsageError, match=r"no model 'own_a'.*--allow own_a:make"):
        build_model("own_a:make", SHAPE, 10, seed=1)
    registry.allow("own_other:make")
    with pytest.raises(UsageError, match="--allow own_a:make"):
        build_model("own_a:make", SHAPE, 10, seed=1)
    assert not (registry.Path.cwd() / "imported").exists()
    registry.allow("own_a:make")
    build_model("own_a:make", SHAPE, 10, seed=1)
    assert (registry.Path.cwd() / "imported").exists()


def test_an_own_network_is_built_with_the_seeds_weights_and_its_argument(code):
    code("own_b", LINEAR)
    registry.allow("own_b:make")
    first = build_model("own_b:make", SHAPE, 7, seed=1)
    again = build_model("own_b:make", SHAPE, 7, seed=1)
    other = build_model("own_b:make", SHAPE, 7, seed=2)
    assert first(torch.zeros(2, *SHAPE)).shape == (2, 7)
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    wider = build_model("own_b:make:5", SHAPE, 7, seed=1)
    assert wider[1].weight.shape == (5, 64)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def make(shape, classes):\n    return 3\n", "gives a int, not a torch.nn.Module"),
        ("def make(shape):\n    return 3\n", r"raised TypeError: make\(\) takes 1"),
        ("def make(shape, classes):\n    raise KeyError('x')\n", r"KeyError: 'x' \(own_c.py:2\)"),
        ("def other(shape, classes):\n    return 3\n", "has no function 'make'.*other"),
        ("make = 3\n", "has no function 'make'"),
        ("import nowhere_at_all\n", "can't be imported: ModuleNotFoundError"),
        ("1/0\n", "can't be imported: ZeroDivisionError"),
    ],
)
def test_a_bad_function_is_told_in_a_sentence(code, text, sentence):
    code("own_c", text)
    registry.allow("own_c:make")
    with pytest.raises(FedkitError, match=sentence):
        build_model("own_c:make", SHAPE, 10, seed=1)


def test_a_misspelt_name_is_told_as_such_and_not_as_a_missing_module(code):
    registry.allow("lenett:batch")
    with pytest.raises(UsageError, match=r"no model 'lenett' \(did you mean lenet"):
        build_model("lenett:batch", SHAPE, 10, seed=1)


def test_a_registered_name_is_never_code(code):
    code("lenet", "def batch(shape, classes):\n    raise AssertionError\n")
    registry.allow("lenet:batch")
    build_model("lenet:batch", SHAPE, 10, seed=1)


def test_a_path_that_is_allowed_allows_no_folder_around_it():
    registry._allowed.clear()
    registry.allow("folder:pictures/cats,size=32", "csv:a-b.csv")
    assert not registry.is_allowed("folder:pictures") and not registry.is_allowed("csv:a")


def test_commas_within_an_arguments_belong_to_it(code):
    code("own_i", LINEAR)
    many = "lenet, mlp:200,200,heterofl-cnn:0.5,group,own_i:make:1,2,preresnet18:0.5,depth=2,cnn"
    plan = make_plan({"models": many, "clients": 6}, local=True)
    assert client_models(plan) == [
        *("lenet", "mlp:200,200", "heterofl-cnn:0.5,group"),
        *("own_i:make:1,2", "preresnet18:0.5,depth=2", "cnn"),
    ]


def test_what_an_own_functions_argument_means_is_its_own_business(code):
    code("own_j", LINEAR)
    registry.allow("own_j:make")
    assert from_scratch("own_j:make:a,pretrained,,b") == "own_j:make:a,pretrained,,b"
    assert from_scratch("resnet18:pretrained") == "resnet18"
    assert from_scratch("shufflenet:0.5,pretrained") == "shufflenet:0.5"
    assert from_scratch("mlp:200,200") == "mlp:200,200"


def test_an_own_partition_may_be_wrapped(code):
    text = """
        import numpy as np
        def halves(samples, shards, argument, generator):
            return np.array_split(np.arange(len(samples)), shards)
    """
    code("own_k", text)
    plan = make_plan({"partition": "share:0.1+own_k:halves", "clients": 3}, local=True)
    assert "own_k:halves" in named_here(plan).split(";")
    data = cut(plan.federation, plan.data)
    assert [len(part) for part in data.dealt.parts] == [300] * 3
    assert all(len(shared) == 100 for shared in data.dealt.shared)


def test_memory_that_runs_out_ends_in_a_sentence():
    for error in (MemoryError(), RuntimeError("[enforce] can't allocate memory: 9 bytes\nmore")):
        assert is_out_of_memory(error)
        assert str(explain(error)).startswith("Memory ran out")
    assert not is_out_of_memory(RuntimeError("another"))


def test_strategies_and_codecs_are_no_users_code(code):
    code("own_d", LINEAR)
    registry.allow("own_d:make")
    for kind in ("strategies", "clients", "codecs", "selectors", "aggregators"):
        with pytest.raises(UsageError, match="There is no"):
            registry.check(kind, "own_d:make")


def test_a_plan_allows_what_its_command_line_names(code):
    code("own_e", LINEAR)
    plan = make_plan({"models": "own_e:make,lenet", "clients": 2}, local=True)
    assert plan.local is not None
    build_model("own_e:make", SHAPE, 10, seed=1)
    with pytest.raises(UsageError, match="no Python module own_f"):
        make_plan({"models": "own_f:make", "clients": 2}, local=True)


def test_several_may_be_allowed_by_name(code):
    code("own_g", LINEAR)
    build(DataSettings, {"allow": "folder:/somewhere; own_g:make"})
    assert registry.is_allowed("folder:/somewhere")
    build_model("own_g:make", SHAPE, 10, seed=1)


def test_a_folder_of_the_users_own_hides_no_package(code, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('hidden')\n")
    code("own_h", LINEAR)
    registry.allow("own_h:make")
    build_model("own_h:make", SHAPE, 10, seed=1)
    assert sys.path[-1] == str(tmp_path)
