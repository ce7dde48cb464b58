"""Sources of bytes and their split."""

import re
from pathlib import PurePosixPath

import pytest

from longstride.data import SPLITS, assign_split, open_source, split_source, standard_library
from longstride.data.splits import FEWEST_FILES_TO_SPLIT, Slice
from longstride.errors import DataError


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def bytes_of(source, slices: list[Slice]) -> bytes:
    return b"".join((source.root / piece.file).read_bytes()[piece.start : piece.stop] for piece in slices)


def test_standard_library_is_python_source_without_tests_and_installed_packages():
    files = {file.as_posix() for file in standard_library().files}
    assert {"json/decoder.py", "argparse.py"} <= files
    assert all(file.endswith(".py") for file in files)
    assert not any(re.search(r"(^|/)(site-packages|dist-packages|test|tests|idle_test)/", file) for file in files)


def test_standard_library_splits_by_file_into_about_90_5_5():
    source = standard_library()
    method, splits = split_source(source, shortest=1024)
    assert method == "by file"
    counts = {split: len(slices) for split, slices in splits.items()}
    assert sum(counts.values()) == len(source.files)
    assert 0.86 < counts["train"] / len(source.files) < 0.94
    assert min(counts["validation"], counts["test"]) > 0.02 * len(source.files)


def test_split_of_a_file_depends_on_its_path_alone():
    # Pinned: another split would let models be tested on what earlier ones were trained on.
    pinned = {"json/decoder.py": "train", "argparse.py": "train", "email/header.py": "validation", "gzip.py": "test"}
    assert {path: assign_split(PurePosixPath(path)) for path in pinned} == pinned


def test_single_file_is_split_contiguously_at_90_and_95_percent(tmp_path):
    data = bytes(range(200)) * 5
    source = open_source(write(tmp_path / "data.bin", data))
    method, splits = split_source(source, shortest=10)
    assert method == "contiguously"
    assert [bytes_of(source, splits[split]) for split in SPLITS] == [data[:900], data[900:950], data[950:]]


def test_folder_of_few_files_is_split_contiguously_across_their_ends(tmp_path):
    parts = [bytes([number]) * 300 for number in range(3)]
    for number, part in enumerate(parts):
        write(tmp_path / "in" / f"{number}.txt", part)
    source = open_source(tmp_path / "in")
    method, splits = split_source(source, shortest=10)
    assert method == "contiguously"
    joined = b"".join(parts)
    assert [bytes_of(source, splits[split]) for split in SPLITS] == [joined[:810], joined[810:855], joined[855:]]


def test_folder_of_many_files_is_split_by_file_and_completely(tmp_path):
    for number in range(200):
        write(tmp_path / "in" / f"part{number % 7}" / f"{number}.txt", b"x" * (number + 1))
    source = open_source(tmp_path / "in")
    method, splits = split_source(source, shortest=10)
    assert method == "by file"
    assert sorted(piece.file for split in SPLITS for piece in splits[split]) == sorted(source.files)
    for split in SPLITS:
        assert {assign_split(piece.file) for piece in splits[split]} == {split}


def test_folder_where_a_split_would_be_too_short_by_file_is_split_contiguously(tmp_path):
    for number in range(FEWEST_FILES_TO_SPLIT):
        write(tmp_path / "in" / f"{number}", b"y" * 100)
    source = open_source(tmp_path / "in")
    by_file = {split: sum(assign_split(file) == split for file in source.files) for split in SPLITS}
    assert min(by_file.values()) == 0, "these names must leave a split empty for this test to mean something"
    assert split_source(source, shortest=100)[0] == "contiguously"


def test_hidden_files_are_left_out(tmp_path):
    write(tmp_path / "in" / ".git" / "config", b"secret")
    write(tmp_path / "in" / ".hidden", b"secret")
    write(tmp_path / "in" / "seen.txt", b"public")
    assert [file.as_posix() for file in open_source(tmp_path / "in").files] == ["seen.txt"]


def test_read_joins_files_up_to_a_limit(tmp_path):
    write(tmp_path / "in" / "a", b"abc")
    write(tmp_path / "in" / "b", b"defg")
    source = open_source(tmp_path / "in")
    assert source.read().tobytes() == b"abcdefg"
    assert source.read(5).tobytes() == b"abcde"
    assert source.read(2).tobytes() == b"ab"


def test_missing_path_names_it_and_the_flag(tmp_path):
    with pytest.raises(DataError, match=rf"no file or folder {tmp_path}/nowhere: check --data"):
        open_source(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["file", "folder of empty files", "folder"])
def test_empty_data_are_refused(tmp_path, kind):
    path = tmp_path / "empty"
    if kind == "file":
        write(path, b"")
    else:
        path.mkdir()
    if kind == "folder of empty files":
        write(path / "a", b"")
    with pytest.raises(DataError, match=f"{path} (is empty|holds no files).*--data elsewhere"):
        open_source(path)


def test_data_shorter_than_the_context_say_how_long_they_are(tmp_path):
    source = open_source(write(tmp_path / "short.txt", b"z" * 1000))
    with pytest.raises(
        DataError, match=r"1,000 bytes.*validation split gets 50: fewer than.*context of 64.*at most 50"
    ):
        split_source(source, shortest=64)
    assert split_source(source, shortest=50)[0] == "contiguously"
