"""Checkpoints notice damage, and the newest sound one is found."""

import json

import pytest

from longstride.errors import CheckpointError
from longstride.training.checkpoints import MANIFEST, damage, latest_sound, list_checkpoints, prune, seal


def make(parent, step: int):
    folder = parent / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 100)
    (folder / "state.json").write_text("{}")
    seal(folder)
    return folder


def flip(folder):
    (folder / "weights").write_bytes(b"w" * 99 + b"x")


def shorten(folder):
    (folder / "weights").write_bytes(b"w" * 50)


def remove(folder):
    (folder / "weights").unlink()


def unseal(folder):
    (folder / MANIFEST).unlink()


def garble(folder):
    (folder / MANIFEST).write_text(json.dumps([1, 2]))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip, "weights was changed"),
        (shorten, "weights has 50 bytes instead of 100"),
        (remove, "weights is missing"),
        (unseal, "complete.json cannot be read"),
        (garble, "complete.json cannot be read"),
    ],
)
def test_damage_is_found_and_the_earlier_checkpoint_taken(tmp_path, harm, words):
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    assert damage(newest) is None
    harm(newest)
    assert words in damage(newest)
    checkpoint, passed_over = latest_sound(tmp_path)
    assert checkpoint.step == 5
    assert len(passed_over) == 1
    assert str(newest) in passed_over[0]
    assert words in passed_over[0]


def test_steps_are_numbers_not_texts(tmp_path):
    for step in (5, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [5, 10, 100]
    assert latest_sound(tmp_path)[0].step == 100


def test_no_sound_checkpoint_left(tmp_path):
    for step in (5, 10):
        flip(make(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"checkpoint-10 is damaged.*checkpoint-5 is damaged.*new --output"):
        latest_sound(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    assert latest_sound(tmp_path / "none") == (None, [])


def test_prune_keeps_the_newest_and_clears_what_was_left_unfinished(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    (tmp_path / ".unfinished-checkpoint-12").mkdir()
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]
