"""Labelled documents: what is read, how it is split, and what is refused."""

import csv
import json

import pytest

from longstride.data import read_labelled
from longstride.errors import DataError


def write(root, **documents):
    """Files by path relative to ``root``, with ``__`` for a slash."""
    for name, text in documents.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


@pytest.fixture
def folder(tmp_path):
    """Twenty documents of one class, four of another, whose names say nothing of the split."""
    many = {f"cats__{number}": f"a cat {number}" for number in range(20)}
    return write(tmp_path / "data", **many, **{f"dogs__deep__{number}": f"a dog {number}" for number in range(4)})


def texts(found, split):
    return {(found.labels[document.label], document.text) for document in found.splits[split]}


def test_a_folder_a_class(folder):
    found = read_labelled(folder)
    assert found.labels == ("cats", "dogs")
    assert [len(found.splits[split]) for split in ("train", "validation", "test")] == [16 + 2, 2 + 1, 2 + 1]
    everything = texts(found, "train") | texts(found, "validation") | texts(found, "test")
    assert everything == {("cats", b"a cat %d" % n) for n in range(20)} | {("dogs", b"a dog %d" % n) for n in range(4)}
    assert "2 classes, 18 for train, 3 for validation, 3 for test documents" in found.describe()


def test_the_split_depends_on_the_bytes_alone(folder, tmp_path):
    renamed = {
        f"{file.parent.name if file.parent.name != 'deep' else 'dogs'}__x{hash(file) % 10**9}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    again = read_labelled(write(tmp_path / "again", **renamed))
    for split in ("train", "validation", "test"):
        assert texts(again, split) == texts(read_labelled(folder), split)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_say_the_same_as_folders(folder, tmp_path, suffix):
    rows = [
        {"number": 1, "text": file.read_text(), "label": "dogs" if "dogs" in str(file) else "cats"}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    path = tmp_path / f"table.{suffix}"
    with path.open("w", newline="") as file:
        if suffix == "jsonl":
            file.write("\n\n".join(map(json.dumps, rows)))
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    found = read_labelled(path)
    assert found.labels == ("cats", "dogs")
    assert found.splits == read_labelled(folder).splits


def test_long_texts_with_line_breaks_and_labels_that_are_numbers(tmp_path):
    path = tmp_path / "table.csv"
    long = "x" * 200_000
    rows = [(f'{long}\n"{number}", and more', number % 2) for number in range(6)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    found = read_labelled(path)
    assert found.labels == ("0", "1")
    assert {document.text.decode() for split in found.splits.values() for document in split} == {t for t, _ in rows}
    jsonl = tmp_path / "table.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    assert read_labelled(jsonl).splits == found.splits


def test_folders_that_are_named_after_splits(tmp_path):
    data = write(
        tmp_path / "data",
        **{f"train__{label}__{n}": f"{label} {n}" for label in ("neg", "pos") for n in range(12)},
        **{f"test__{label}__{n}": f"{label} test {n}" for label in ("neg", "pos") for n in range(2)},
    )
    found = read_labelled(data)
    assert found.labels == ("neg", "pos")
    assert texts(found, "test") == {(label, f"{label} test {n}".encode()) for label in ("neg", "pos") for n in range(2)}
    assert [len(found.splits[split]) for split in ("train", "validation")] == [22, 2]


def test_a_named_split_is_taken_as_it_lies(tmp_path):
    """A class that the test folder lacks gets no test documents from elsewhere; hidden folders are no classes."""
    train = {f"train__{label}__{n}": f"{label} {n}" for label in ("neg", "new", "pos") for n in range(9)}
    test = {f"test__{label}__{n}": f"{label} test {n}" for label in ("neg", "pos") for n in range(2)}
    data = write(tmp_path / "data", **train, **test, **{f"train__.hidden__{n}": f"{n}" for n in range(9)})
    found = read_labelled(data)
    assert found.labels == ("neg", "new", "pos")
    assert texts(found, "test") == {(label, f"{label} test {n}".encode()) for label in ("neg", "pos") for n in range(2)}
    assert len(found.splits["validation"]) == 3
    write(data, test__only__1="a", test__only__2="b", test__only__3="c", val__neg__1="d")
    with pytest.raises(DataError, match="the class only has 0 documents to train on, and needs at least 1, so that"):
        read_labelled(data)


def test_a_class_without_documents_is_refused(folder):
    (folder / "birds").mkdir()
    with pytest.raises(DataError, match="birds holds no documents, and a sub-folder is a class: put its documents"):
        read_labelled(folder)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(6)]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert read_labelled(path).labels == ("a", "b")


def test_empty_documents_and_copies_are_left_out_and_counted(folder):
    write(folder, cats__empty="", cats__blank=" \n", dogs__copy="a cat 3", dogs__copy2="a dog 1")
    found = read_labelled(folder)
    assert found.left_out == {"documents were empty": 2, "documents were copies of others": 2}
    assert sum(map(len, found.splits.values())) == 24
    assert "2 documents were copies of others, and were left out." in found.describe()


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "missing", "there is no file or folder .*missing: check --data"),
        ({"data__a": "text"}, "data", "has no sub-folders: a class is a sub-folder with its documents"),
        ({"data__cats__1": "a", "data__cats__2": "b"}, "data", "has the one class cats: .* at least two classes"),
        (
            {"data__a__1": "1", "data__a__2": "2", "data__a__3": "3", "data__b__1": "4"},
            "data",
            "class b has 1 documents to train on, and needs at least 3, so that training, validation, test have",
        ),
        ({"table.txt": "a"}, "table.txt", "name ends in one of .csv, .tsv, .jsonl"),
        ({"t.csv": "body,label\na,b\n"}, "t.csv", "must name the columns text and label; it has 'body', 'label'"),
        ({"t.csv": ""}, "t.csv", "must name the columns text and label; it has none"),
        ({"t.csv": "text,label\na,b\nc\n"}, "t.csv", "row 2: it must have a text .* and a class"),
        ({"t.csv": "text,label\na,b\nsome, more,c\n"}, "t.csv", "row 2 has 3 fields for 2 columns: put a text that"),
        ({"t.csv": 'text,label\na,b\n"c,b\nd,e\n'}, "t.csv", "row 2: unexpected end of data; a field that begins"),
        ({"t.tsv": 'text\tlabel\n"a" b\tc\n'}, "t.tsv", "row 1: .* expected after .*; a field that begins with"),
        ({"t.csv": b"text,label\n" + b"x" * 20_000 + b"\xff,b\n"}, "t.csv", r"is not UTF-8 text \(invalid start byte"),
        ({"t.jsonl": '{"text": "a", "label": "b"}\nnothing\n'}, "t.jsonl", "line 2: no JSON object"),
        ({"t.jsonl": '{"text": 3, "label": "b"}\n'}, "t.jsonl", "row 1: it must have a text"),
        ({"t.jsonl": "[1]\n"}, "t.jsonl", "row 1: it must have a text"),
    ],
)
def test_what_is_no_labelled_data_is_named(tmp_path, files, name, message):
    write(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        read_labelled(tmp_path / name)
