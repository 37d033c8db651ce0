"""Which paths a data set may read: a stranger's word does not reach beyond the data root."""

from __future__ import annotations

import pytest

from fedkit import registry
from fedkit.data.places import data_root, own_path
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    monkeypatch.setattr(registry, "_allowed", set())


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A data root with pictures in it, secrets beside it, and a current folder elsewhere."""
    for name in ("root/pictures/deep", "root/both", "secrets", "here/mine", "here/both"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secrets")
    (tmp_path / "root" / "around").symlink_to(tmp_path / "root" / "pictures")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def placed(machine, path, root="root"):
    sources = DataSettings(str(machine / root) if root else "")
    return own_path(f"folder:{path}", path, sources)


@pytest.mark.parametrize("path", ["pictures", "pictures/deep", "around", "."])
def test_what_lies_in_the_data_root_may_be_read(machine, path):
    assert placed(machine, path) == machine / "root" / path


@pytest.mark.parametrize(
    "path", ["../secrets", "pictures/../../secrets", "out", "out/../pictures", "mine", "~", "~root"]
)
def test_nothing_else_may_be_read_unless_it_was_named_here(machine, path):
    with pytest.raises(FedkitError) as caught:
        placed(machine, path)
    if path != "mine":  # which is no path out: it is just not there
        assert isinstance(caught.value, UsageError)
        assert f"--dataset folder:{path} or --allow folder:{path}" in str(caught.value)


def test_absolute_paths_and_a_machine_without_a_root_need_permission(machine):
    inside = str(machine / "root" / "pictures")
    for path, root in ((inside, "root"), ("pictures", ""), ("mine", "")):
        with pytest.raises(UsageError, match="--allow"):
            placed(machine, path, root)


def test_what_was_named_here_is_read_wherever_it_is(machine):
    registry.allow("folder:mine", "folder:both", "folder:../secrets", f"folder:{machine}/secrets")
    assert placed(machine, "mine").resolve() == machine / "here" / "mine"
    assert placed(machine, "both") == machine / "root" / "both"  # the data root comes first
    assert placed(machine, "both", "").resolve() == machine / "here" / "both"
    assert placed(machine, "../secrets").resolve() == machine / "secrets"
    assert placed(machine, f"{machine}/secrets") == machine / "secrets"


def test_permission_for_one_data_set_is_none_for_another(machine):
    registry.allow("folder:../secrets,grey", "csv:../secrets")
    with pytest.raises(UsageError, match="--allow"):
        placed(machine, "../secrets")


def test_all_places_that_were_tried_are_named(machine):
    registry.allow("folder:nowhere")
    with pytest.raises(FedkitError, match=r"there is no .*root/nowhere or nowhere"):
        placed(machine, "nowhere")


@pytest.mark.parametrize("path", ["x" * 5000, "circle", "~nobody-of-that-name/x"])
def test_a_path_that_can_not_be_looked_up_is_a_sentence(machine, path):
    (machine / "root" / "circle").symlink_to("circle")
    for _ in range(2):
        with pytest.raises(FedkitError):
            placed(machine, path)
        registry.allow(f"folder:{path}")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_no_path_is_none(machine, path):
    with pytest.raises(UsageError, match="folder:PATH"):
        placed(machine, path)


def test_the_data_root_is_the_option_before_the_environment(machine, monkeypatch):
    with pytest.raises(FedkitError, match="give --data-root FOLDER"):
        data_root("MNIST", DataSettings())
    monkeypatch.setenv("FEDKIT_DATA_ROOT", str(machine / "here"))
    assert data_root("MNIST", DataSettings()) == machine / "here"
    assert data_root("MNIST", DataSettings(str(machine / "root"))) == machine / "root"
    with pytest.raises(FedkitError, match="is not a folder"):
        data_root("MNIST", DataSettings(str(machine / "nowhere")))
