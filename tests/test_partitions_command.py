"""``fedkit partition``: what a run would deal, in numbers and as a picture."""

import json
import subprocess
import sys

import numpy as np
import pytest
import typer

from fedkit.cli import partition
from fedkit.data.drawing import draw
from fedkit.data.splits import cut
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings, FederationSettings


@pytest.fixture
def fedkit(capsys):
    """The command in this process: what it prints, or its error."""
    app = typer.Typer()
    partition.register(app)

    def run(*words):
        typer.main.get_command(app).main([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_it_shows_what_a_run_would_deal(fedkit):
    typed = ["--partition", "share:0.1+classes:2", "--num-shards", "5", "--seed", "3"]
    shown = json.loads(fedkit(*typed, "--format", "json"))
    settings = FederationSettings(partition="share:0.1+classes:2", num_shards=5, seed=3)
    data = cut(settings, DataSettings())
    assert shown["sha256"] == data.partition_digest
    assert [row["samples"] for row in shown["shards"]] == [len(part) for part in data.dealt.parts]
    assert {row["shared"] for row in shown["shards"]} == {shown["shared_pool"]} == {100}
    # Everybody sees every class through the shared pool.
    assert {row["classes"] for row in shown["shards"]} == {10} and shown["dropped"] == 0
    labels = data.dataset.train.labels.numpy()
    for shard, row in enumerate(shown["shards"]):
        mine = labels[np.union1d(data.dealt.parts[shard], data.dealt.shared[shard])]
        counts = np.bincount(mine, minlength=10)
        assert row["largest_share"] == pytest.approx(counts.max() / counts.sum())
        p = counts / counts.sum()
        assert row["effective_classes"] == pytest.approx(
            np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
        )
        whole = np.bincount(labels) / len(labels)
        assert row["total_variation"] == pytest.approx(np.abs(p - whole).sum() / 2)
    mean = np.mean([row["total_variation"] for row in shown["shards"]])
    assert shown["mean"]["total_variation"] == pytest.approx(mean)


def test_the_table_says_what_nobody_holds(fedkit):
    printed = fedkit("--partition", "heterofl:2", "--num-shards", "20", "--seed", "2")
    assert "heterofl:2 of digits over 20 shards" in printed
    dropped = cut(FederationSettings(partition="heterofl:2", seed=2), DataSettings()).dealt.dropped
    assert dropped > 0 and f"{dropped} samples are held by nobody" in printed
    assert len([line for line in printed.splitlines() if line.startswith("│")]) == 21


def test_a_runs_settings_may_be_read_from_its_file(fedkit, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        'strategy = "fedmd"\npartition = "classes:3"\nnum-shards = 7\nval-fraction = 0.1\n'
    )
    shown = json.loads(fedkit("--config", file, "--num-shards", "6", "--format", "json"))
    assert shown["partition"] == "classes:3" and shown["num_shards"] == 6
    assert {row["classes"] for row in shown["shards"]} == {3}


def test_a_partition_of_ones_own_needs_no_more_than_its_name(fedkit, tmp_path, monkeypatch):
    (tmp_path / "my_partition.py").write_text(
        "import numpy as np\n"
        "def halves(samples, shards, argument, generator):\n"
        "    kept = np.arange(len(samples.labels) // 2)\n"
        "    return [part.astype(np.int64) for part in np.array_split(kept, shards)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shown = json.loads(fedkit("--partition", "my_partition:halves", "--format", "json"))
    assert shown["dropped"] == 500 and len(shown["shards"]) == 20


def test_plot_draws_what_the_table_shows(fedkit, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "who.svg"
    printed = fedkit("--num-shards", "8", "--plot", path)
    assert printed.endswith(f"Drawn to {path}.\n")
    text = path.read_text()
    assert "<!-- dirichlet:0.5 of digits over 8 shards -->" in text
    largest = max(
        int(row.split("│")[2])
        for row in printed.splitlines()
        if row.startswith("│") and "mean" not in row
    )
    shown = cut(FederationSettings(num_shards=8), DataSettings())
    assert largest == max(len(part) for part in shown.dealt.parts)
    counts = np.bincount(shown.dataset.train.labels.numpy()[shown.dealt.parts[0]])
    assert all(f"<!-- {count} -->" in text for count in counts if count)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_is_of_the_kind_that_its_name_says(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    magic = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}[suffix]
    path = tmp_path / f"who.{suffix}"
    draw(np.array([[3, 0, 5], [1, 1, 1]]), ["a", "b", "$c"], "Title", "about", path)
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize(("shards", "classes"), [(1, 1), (4, 100), (100, 10)])
def test_every_shard_and_class_is_in_the_picture(tmp_path, shards, classes):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    counts = np.random.default_rng(1).integers(0, 50, (shards, classes))
    counts[:, 0] += 1
    path = tmp_path / "who.svg"
    draw(counts, [f"kind{number:03}" for number in range(classes)], "Title", "about", path)
    text = path.read_text()
    assert all(f"<!-- kind{number:03} -->" in text for number in range(classes))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--plot", "who.jpeg"], "--plot takes a file ending in .png, .svg, .pdf, not who.jpeg"),
        (["--partition", "lecture:2"], "take --num-shards 10, or classes:2"),
        (["--partition", "natural"], "this data set does not know them"),
        (["--partition", "dirichelt:1"], "did you mean dirichlet"),
        (["--num-shards", "0"], "num-shards must be at least 1"),
        (["--format", "yaml"], "--format takes text or json"),
    ],
)
def test_what_cannot_be_meant_is_refused(fedkit, words, sentence):
    with pytest.raises(UsageError, match=sentence):
        fedkit(*words)


def test_a_picture_that_cannot_be_written_is_named(fedkit, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "nowhere" / "who.png"
    with pytest.raises(FedkitError, match=r"picture .*who\.png can't be written: No such file"):
        fedkit("--plot", path)


def test_without_matplotlib_a_sentence_says_how_to_get_it(fedkit, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'fedkit\[plot\]'"):
        fedkit("--plot", "who.png")


def test_it_is_a_command_of_fedkit():
    command = [sys.executable, "-m", "fedkit", "partition", "--partition", "lecture:2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "take --num-shards 10" in done.stderr
