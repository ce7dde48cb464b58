"""Folders that are complete or absent."""

import os

import pytest

from longstride.data import written_whole
from longstride.data.folders import UNFINISHED


def test_folder_appears_with_its_content_only_at_the_end(tmp_path):
    with written_whole(tmp_path / "a" / "b") as unfinished:
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "file").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "sub" / "file").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_failure_leaves_the_earlier_folder_untouched(tmp_path):
    with written_whole(tmp_path / "a") as unfinished:
        (unfinished / "file").write_text("old")

    def fail():
        with written_whole(tmp_path / "a") as unfinished:
            (unfinished / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_earlier_folder_is_replaced_completely(tmp_path):
    for name in ("old", "new"):
        with written_whole(tmp_path / "a") as unfinished:
            (unfinished / name).write_text(name)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_a_killed_process_do_not_end_up_in_the_folder(tmp_path):
    leftover = tmp_path / f"{UNFINISHED}a"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with written_whole(tmp_path / "a") as unfinished:
        (unfinished / "file").write_text("1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    original = os.fsync

    def fsync(descriptor):
        # The name that the descriptor had when it was flushed.
        flushed.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), (tmp_path / "a").exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_whole(tmp_path / "a") as unfinished:
        (unfinished / "file").write_text("1")
    if os.path.exists("/proc/self/fd"):
        assert flushed == [
            (str(unfinished / "file"), False),
            (str(unfinished), False),
            (str(tmp_path), True),
        ]
