"""The copy of the splits that a run keeps."""

import numpy as np
import pytest

from longstride.data import PreparedData, open_source, prepare
from longstride.errors import DataError


def source_of(path, data: bytes):
    path.write_bytes(data)
    return open_source(path)


def test_splits_are_copied_byte_for_byte_and_memory_mapped(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    prepared = prepare(source_of(tmp_path / "data.bin", data.tobytes()), tmp_path / "run" / "data", context=100)
    assert prepared.tokens == {"train": 2_700_000, "validation": 150_000, "test": 150_000}
    assert isinstance(prepared.split("train"), np.memmap)
    joined = np.concatenate([prepared.split(name) for name in ("train", "validation", "test")])
    assert np.array_equal(joined, data)


def test_copy_outlives_its_source_and_opens_as_it_was(tmp_path):
    source = source_of(tmp_path / "data.txt", b"abcdefghij" * 100)
    prepared = prepare(source, tmp_path / "data", context=10)
    (tmp_path / "data.txt").unlink()
    opened = PreparedData.open(tmp_path / "data")
    assert opened == prepared
    assert opened.split("test").tobytes() == b"abcdefghij" * 5


def test_description_has_source_method_counts_and_bytes(tmp_path):
    text = prepare(source_of(tmp_path / "data.txt", b"x" * 20_000), tmp_path / "data", context=10).describe()
    assert f"{tmp_path}/data.txt, split at 90 % and 95 % of the bytes" in text
    assert "train 18,000 bytes (1 file), validation 1,000 bytes (1 file), test 1,000 bytes (1 file)" in text


def test_nothing_is_left_of_a_copy_that_failed(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_bytes(b"x" * 1000)
    (folder / "b").write_bytes(b"x" * 1000)
    source = open_source(folder)
    (folder / "b").unlink()
    with pytest.raises((DataError, OSError)):
        prepare(source, tmp_path / "data", context=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_damaged_copy_is_refused(tmp_path):
    prepare(source_of(tmp_path / "data.txt", b"x" * 20_000), tmp_path / "data", context=10)
    with (tmp_path / "data" / "test.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"test.bin has 1,004 bytes, but 1,000 were written"):
        PreparedData.open(tmp_path / "data")
    (tmp_path / "data" / "splits.json").write_text("{")
    with pytest.raises(DataError, match="does not hold prepared data"):
        PreparedData.open(tmp_path / "data")
