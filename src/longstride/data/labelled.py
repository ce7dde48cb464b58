"""Documents with a label each: a folder for every class, or a table with the columns ``text`` and ``label``.

====================  ==============================================================================================
a folder              every sub-folder is a class and every file in it, at any depth, a document. Where the sub-folders
                      are named after splits (``train``, ``test``, ``val``), the classes are theirs, and the documents
                      are split as they lie; a split without a folder is taken from ``train``
``.csv``, ``.tsv``    a row is a document; the first row names the columns
``.jsonl``            a line is a JSON object with ``text`` and ``label``
====================  ==============================================================================================

A document is its bytes. Empty ones, and all but the first of equal ones, are left out and counted: a copy in another
split would be a question whose answer was learnt. All documents are in memory.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longstride.data.bytes import walk
from longstride.data.kind import NAMED_FOLDERS
from longstride.data.splits import SPLITS
from longstride.errors import DataError

TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None}
#: Of every class, one document in so many is for validation, and one for the test.
SHARE = 10


@dataclass(frozen=True)
class Labelled:
    """A document and the number of its class."""

    text: bytes
    label: int


@dataclass(frozen=True)
class LabelledSplits:
    """Documents of several classes, split.

    Args:
        name: what a reader of the screen should see.
        labels: the classes by name, in alphabetical order.
        splits: of each of `SPLITS`, its documents.
        left_out: how many documents were left out, by reason.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, tuple[Labelled, ...]]
    left_out: dict[str, int]

    def describe(self) -> str:
        """One line for the screen."""
        counts = ", ".join(f"{len(self.splits[split]):,} for {split}" for split in SPLITS)
        lengths = sorted(len(document.text) for document in self.splits["train"])
        dropped = "".join(f" {count:,} {why}, and were left out." for why, count in self.left_out.items())
        return (
            f"Data: {self.name}, {len(self.labels)} classes, {counts} documents, of {lengths[0]:,} to "
            f"{lengths[-1]:,} bytes, the middle one {lengths[len(lengths) // 2]:,}.{dropped}"
        )


def read_labelled(path: Path) -> LabelledSplits:
    """Read all documents and split them: as their folders are named, or of every class 80 %, 10 % and 10 %.

    That split depends on the documents' bytes alone, so it is the same on every machine, whatever their order.

    Raises:
        DataError: nothing there that has labels; a row or line that is not legal; fewer than two classes; a class with
            too few documents to split.
    """
    if not path.exists():
        raise DataError(f"there is no file or folder {path}: check --data")
    read = _folders(path) if path.is_dir() else _table(path)
    found: dict[str, list[tuple[str | None, bytes]]] = {}
    left_out: Counter[str] = Counter()
    known: set[bytes] = set()
    for split, label, text in read:
        documents = found.setdefault(label, [])
        digest = hashlib.sha256(text).digest()
        if not text.strip():
            left_out["documents were empty"] += 1
        elif digest in known:
            left_out["documents were copies of others"] += 1
        else:
            known.add(digest)
            documents.append((split, text))
    labels = tuple(sorted(found))
    if len(labels) < 2:
        raise DataError(
            f"{path} has {f'the one class {labels[0]}' if labels else 'no documents'}: a classification needs at least "
            "two classes, each a sub-folder with its documents, or a value of the column label"
        )
    splits: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    named = {split for documents in found.values() for split, _ in documents}
    # A test folder is the test, even where it lacks a class.
    missing = [split for split in ("validation", "test") if split not in named]
    for number, label in enumerate(labels):
        for split, texts in _split(path, label, found[label], missing).items():
            splits[split] += [Labelled(text, number) for text in texts]
    return LabelledSplits(str(path), labels, {name: tuple(each) for name, each in splits.items()}, dict(left_out))


def _folders(path: Path) -> Iterator[tuple[str | None, str, bytes]]:
    """(split or None, label, bytes) of every document in the folder's sub-folders."""
    folders = _sub_folders(path)
    if not folders:
        raise DataError(
            f"{path} has no sub-folders: a class is a sub-folder with its documents; or name a file with the columns "
            f"text and label ({', '.join(TABLES)})"
        )
    split_of = [NAMED_FOLDERS.get(folder.name.lower()) for folder in folders]
    if None not in split_of and len(folders) > 1:
        for split, folder in zip(split_of, folders, strict=True):
            for label in _sub_folders(folder):
                yield from ((split, label.name, text) for text in _documents(label))
        return
    for folder in folders:
        yield from ((None, folder.name, text) for text in _documents(folder))


def _sub_folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _documents(folder: Path) -> Iterator[bytes]:
    """The documents of a class."""
    files = sorted(walk(folder))
    if not files:
        raise DataError(
            f"{folder} holds no documents, and a sub-folder is a class: put its documents there, or remove it"
        )
    yield from (_bytes(folder / file) for file in files)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _table(path: Path) -> Iterator[tuple[None, str, bytes]]:
    """(None, label, bytes) of every row of a table."""
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise DataError(
            f"{path}: labelled documents are a folder with a sub-folder a class, or a file with text and label, whose "
            f"name ends in one of {', '.join(TABLES)}"
        )
    rows = _lines(path) if suffix == ".jsonl" else _rows(path, TABLES[suffix])
    try:
        for number, row in rows:
            text, label = row.get("text"), row.get("label")
            if not isinstance(text, str) or isinstance(label, (dict, list, type(None))) or not str(label).strip():
                raise DataError(f"{path}, row {number:,}: it must have a text (field text) and a class (field label)")
            yield None, str(label).strip(), text.encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        # Not where: the decoder counts from the last chunk that it was given.
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _rows(path: Path, delimiter: str | None) -> Iterator[tuple[int, dict]]:
    assert delimiter is not None
    # The longest field that the platform's C long can count; documents are longer than the default of 131,072.
    before = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: a quote that is never closed would otherwise take the rest of the file for one document.
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            if not {"text", "label"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{path}: its first row must name the columns text and label; it has "
                    f"{', '.join(map(repr, reader.fieldnames or ())) or 'none'}"
                )
            number = 0
            try:
                for number, row in enumerate(reader, start=1):
                    if None in row:
                        columns = len(row) - 1
                        raise DataError(
                            f"{path}, row {number:,} has {columns + len(row[None])} fields for {columns} columns: put "
                            f"a text that holds {delimiter!r} between double quotes"
                        )
                    yield number, row
            except csv.Error as error:
                raise DataError(
                    f"{path}, row {number + 1:,}: {error}; a field that begins with a double quote must end with one, "
                    "and those inside it are doubled"
                ) from error
    finally:
        csv.field_size_limit(before)


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number:,}: no JSON object ({error})") from error
            yield number, row if isinstance(row, dict) else {}


def _split(
    path: Path, label: str, documents: list[tuple[str | None, bytes]], missing: list[str]
) -> dict[str, list[bytes]]:
    """The documents of one class by split; those of the ``missing`` splits are taken from the training's."""
    named: dict[str, list[bytes]] = {split: [text for where, text in documents if where == split] for split in SPLITS}
    # In an order that their bytes decide, and that has nothing to do with what they say.
    rest = [text for where, text in documents if where is None or where == "train"]
    rest.sort(key=lambda text: hashlib.sha256(text).digest())
    if len(rest) < 1 + len(missing):
        raise DataError(
            f"{path}: the class {label} has {len(rest)} documents to train on, and needs at least {1 + len(missing)}, "
            f"so that {', '.join(('training', *missing))} have one each: add some, or cut long documents into files of "
            "their own"
        )
    count = max(1, len(rest) // SHARE)
    for split in missing:
        named[split], rest = rest[:count], rest[count:]
    return named | {"train": rest}
