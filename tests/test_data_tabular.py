"""Tables: numbers and classes out of CSV files, and a sentence for each way to spoil one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkit import registry
from fedkit.data.datasets import open_dataset
from fedkit.data.samples import Form
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setattr(registry, "_allowed", set())


def table(path, text, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def opened(root, spec, form=None):
    return open_dataset(spec, DataSettings(str(root)), form)


def rows_of(pool):
    samples = pool.all()
    return {
        (*row, label)
        for row, label in zip(samples.data.tolist(), samples.labels.tolist(), strict=True)
    }


def test_every_row_is_there_once_and_a_fifth_is_for_testing(tmp_path):
    rows = [(number, number % 7 / 8, number % 3) for number in range(50)]
    text = "".join(f"{one},{other},{'abc'[label]}\n" for one, other, label in rows)
    table(tmp_path / "t.csv", "one,other,kind\n" + text)
    data = opened(tmp_path, "csv:t.csv")
    assert (len(data.train), len(data.test)) == (40, 10)
    assert rows_of(data.train) | rows_of(data.test) == {tuple(map(float, row)) for row in rows}
    assert data.classes == ("a", "b", "c") and data.columns == ("one", "other")
    assert data.train.all().data.dtype == torch.float32 and data.train.shape == (2,)
    again = opened(tmp_path, "csv:t.csv")
    assert torch.equal(again.test.all().data, data.test.all().data)


def test_features_are_standardised_by_the_training_rows_alone(tmp_path):
    rng = np.random.default_rng(0)
    numbers = rng.normal(5, 3, (200, 2))
    lines = [f"{one:.7g},{other:.7g},4,{at % 2}" for at, (one, other) in enumerate(numbers)]
    table(tmp_path / "t.csv", "\n".join(["a,b,same,label", *lines]))
    train = opened(tmp_path, "csv:t.csv").train
    inputs = train.all().inputs(slice(None)).double().numpy()
    assert np.allclose(inputs[:, :2].mean(axis=0), 0, atol=1e-6)
    assert np.allclose(inputs[:, :2].std(axis=0), 1, atol=1e-6)
    assert not inputs[:, 2].any() and train.std[2] == 1


def test_a_folder_holds_both_parts(tmp_path):
    table(tmp_path / "d" / "train.csv", "a,label\n1,x\n2,y\n")
    table(tmp_path / "d" / "test.csv", "label,a\nz,7\n")
    data = opened(tmp_path, "csv:d")
    assert data.test.all().data.tolist() == [[7.0]] and data.classes == ("x", "y", "z")
    assert data.test.labels.tolist() == [2]


@pytest.mark.parametrize(
    ("header", "option", "label"),
    [
        ("a,class,b", "", "class"),
        ("target,a,b", "", "target"),
        ("a,b,state", "", "state"),
        ("a,label,state", ",label=a", "a"),
    ],
)
def test_the_class_stands_where_one_expects_it(tmp_path, header, option, label):
    table(tmp_path / "t.csv", f"{header}\n1,2,3\n4,5,6\n7,8,9\n")
    columns = opened(tmp_path, f"csv:t.csv{option}").columns
    assert columns == tuple(name for name in header.split(",") if name != label)


def test_numbers_are_sorted_as_numbers_and_texts_as_texts(tmp_path):
    table(tmp_path / "n.csv", "a,label\n1,10\n1,9\n1,-1\n1,10\n")
    table(tmp_path / "t.csv", "a,label\n1,10\n1,9\n1,b\n")
    assert opened(tmp_path, "csv:n.csv").classes == ("-1", "9", "10")
    assert opened(tmp_path, "csv:t.csv").classes == ("10", "9", "b")


def test_the_federations_columns_are_read_in_its_order(tmp_path):
    table(tmp_path / "t.csv", "a,extra,label,b\n1,2,x,3\n4,5,y,6\n")
    data = opened(tmp_path, "csv:t.csv", Form((2,), ("b", "a")))
    assert data.columns == ("b", "a")
    assert rows_of(data.train) | rows_of(data.test) == {(3.0, 1.0, 0), (6.0, 4.0, 1)}
    with pytest.raises(FedkitError, match=r"t\.csv has no feature 'c'"):
        opened(tmp_path, "csv:t.csv", Form((2,), ("b", "c")))
    with pytest.raises(FedkitError, match="has no feature 'label'"):
        opened(tmp_path, "csv:t.csv,label=label", Form((1,), ("label",)))


def test_a_public_table_needs_no_labels(tmp_path):
    table(tmp_path / "t.csv", "a,b\n1,2\n3,4\n")
    for data in (
        opened(tmp_path, "csv:t.csv,label="),
        opened(tmp_path, "csv:t.csv", Form((2,), ("a", "b"))),
    ):
        assert data.classes == () and data.columns == ("a", "b")
        assert (len(data.train), len(data.test)) == (2, 0)
        assert data.train.labels.tolist() == [0, 0]


def test_many_rows_are_read_in_blocks_without_a_seam(tmp_path):
    count = 9000
    table(tmp_path / "t.csv", "a,label\n" + "".join(f"{n},{n % 2}\n" for n in range(count)))
    data = opened(tmp_path, "csv:t.csv")
    values = torch.cat([data.train.all().data, data.test.all().data]).flatten()
    assert torch.equal(values.sort().values, torch.arange(count, dtype=torch.float32))


def test_a_byte_order_mark_blanks_and_quotes_are_no_trouble(tmp_path):
    table(tmp_path / "t.csv", '\ufeffa, b ,label\r\n "1", 2,"x, y"\r\n\r\n3,4,z\r\n')
    data = opened(tmp_path, "csv:t.csv")
    assert data.columns == ("a", "b") and data.classes == ("x, y", "z")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("a,label\n", "has a header and no rows"),
        ("a,b,label\n1,2,x\n1,x\n", "line 3 has 2 cells, the header 3"),
        ("a,b,label\n1,2,x\n1,,x\n", "line 3: the column b is empty"),
        ("a,b,label\n1,2,x\n1,2,\n", "line 3: the column label is empty"),
        ("a,b,label\n1,2,x\n1,two,x\n", "line 3: 'two' in the column b is no number"),
        ("a,b,label\n1,nan,x\n", "line 2: 'nan' in the column b"),
        ("a,b,label\n1,1e39,x\n", "line 2: '1e39' in the column b"),
        ('a,b,label\n"1\n",2,x\n1,-inf,x\n', "line 4: '-inf' in the column b"),
        ("a,a,label\n1,2,x\n", "two columns named 'a'"),
        ("a,,label\n1,2,x\n", "column 2 has no name"),
        ("1,2,3\n1,2,3\n", "line 1 must name the columns"),
        ("a;b;label\n1;2;x\n", "separated by commas"),
        ('a,label\n1,"x\n', r"line \d is no CSV"),
        ("a,label,class\n1,2,3\n", "say which is the class"),
        ("a,label\n" + "1,x\n" * 5000 + "?,x\n", "line 5002: '\\?' in the column a"),
    ],
)
def test_a_spoilt_table_is_told_by_file_line_and_column(tmp_path, text, sentence):
    table(tmp_path / "t.csv", text)
    with pytest.raises(FedkitError, match=sentence) as caught:
        opened(tmp_path, "csv:t.csv")
    assert str(tmp_path / "t.csv") in str(caught.value)


def test_another_encoding_is_told_with_its_line(tmp_path):
    table(tmp_path / "t.csv", "a,label\n1,x\n2,müde\n", "latin-1")
    with pytest.raises(FedkitError, match=r"t\.csv, line 3 is no UTF-8"):
        opened(tmp_path, "csv:t.csv")


def test_what_is_not_there_is_named(tmp_path):
    table(tmp_path / "d" / "train.csv", "a,label\n1,x\n")
    with pytest.raises(FedkitError, match=r"There is no .*test\.csv"):
        opened(tmp_path, "csv:d")
    table(tmp_path / "d" / "test.csv", "b,label\n1,x\n")
    with pytest.raises(FedkitError, match=r"test\.csv has no column 'a'"):
        opened(tmp_path, "csv:d")
    with pytest.raises(UsageError, match="has no column 'c'; it has a, label"):
        opened(tmp_path, "csv:d/train.csv,label=c")
    with pytest.raises(UsageError, match="csv:PATH"):
        opened(tmp_path, "csv")
