"""MIDI as events and rolls, and back; files that are damaged or claim nonsense."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.data import make_kind
from longstride.data.kind import CorruptFileError
from longstride.data.midi import Midi, events_to_notes, notes_to_events
from longstride.data.notes import Notes, read_notes, write_notes
from longstride.data.piano_roll import OFF_THE_PIANO, PianoRoll, notes_to_roll, roll_to_notes
from longstride.errors import DataError

symusic = pytest.importorskip("symusic")


def notes(*rows):
    """Notes of (onset in s, offset in s, pitch, velocity)."""
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Notes(columns[0], columns[1], columns[2].astype(int), columns[3].astype(int))


def rows(found: Notes) -> list:
    return [
        (round(float(a), 3), round(float(b), 3), int(p), int(v))
        for a, b, p, v in zip(found.onset, found.offset, found.pitch, found.velocity, strict=True)
    ]


def midi(tracks: list[bytes], division=500, promised=None) -> bytes:
    """A MIDI file by hand; each track is its events without the end of the track."""
    count = len(tracks) if promised is None else promised
    content = b"MThd" + (6).to_bytes(4, "big") + b"\0\1" + count.to_bytes(2, "big") + division.to_bytes(2, "big")
    for track in tracks:
        whole = track + b"\x00\xff\x2f\x00"
        content += b"MTrk" + len(whole).to_bytes(4, "big") + whole
    return content


# C4 for 480 ticks; at 120 beats a minute and 500 ticks a beat, 0.48 s.
C4 = b"\x00\x90\x3c\x50" + b"\x83\x60\x80\x3c\x00"


def write(path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_events_are_the_documented_ones():
    piece = notes((0.0, 0.5, 60, 80), (0.5, 2.75, 64, 80), (0.5, 1.0, 67, 100))
    assert notes_to_events(piece).tolist() == [
        356 + 20, 60,  # velocity 80 is bin 20; C4 on
        256 + 49,  # 500 ms
        128 + 60,  # off before on
        64, 356 + 25, 67,  # velocity 100 is bin 25
        256 + 49, 128 + 67,
        256 + 99, 256 + 74, 128 + 64,  # 1.75 s in two moves
    ]  # fmt: skip


def test_events_come_back_as_notes_at_their_bin_s_velocity():
    piece = notes((0.0, 0.5, 60, 80), (0.5, 2.75, 64, 80), (0.5, 1.0, 67, 100))
    assert rows(events_to_notes(notes_to_events(piece))) == [
        (0.0, 0.5, 60, 82), (0.5, 2.75, 64, 82), (0.5, 1.0, 67, 102),
    ]  # fmt: skip


piece_steps = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 300), st.integers(0, 127), st.integers(1, 127)),
    min_size=1,
    max_size=30,
)


@given(piece_steps)
def test_any_piece_is_the_same_after_going_there_and_back(steps):
    piece = notes(*sorted((a / 100, (a + b) / 100, p, v) for a, b, p, v in steps))
    events = notes_to_events(piece)
    assert events.max() < 388
    back = events_to_notes(events)
    assert notes_to_events(back).tolist() == events.tolist()
    # Every key is struck when it was, as often as it was.
    struck = {(round(onset * 100), pitch) for onset, pitch in zip(back.onset, back.pitch, strict=True)}
    assert struck == {(start, pitch) for start, _, pitch, _ in steps}


@given(st.lists(st.integers(0, 387), max_size=200))
def test_any_tokens_are_music(tokens):
    found = events_to_notes(np.array(tokens, dtype=np.int64))
    assert (found.offset > found.onset).all()
    assert ((found.velocity >= 1) & (found.velocity <= 127)).all()


def test_events_survive_a_file(tmp_path):
    rng = np.random.default_rng(0)
    starts, lengths = np.sort(rng.integers(0, 60_000, 300)) / 100, rng.integers(1, 200, 300) / 100
    piece = Notes(starts, starts + lengths, rng.integers(0, 128, 300), rng.integers(1, 128, 300))
    events = notes_to_events(piece)
    Midi().write(events.astype(np.int64), tmp_path / "a.mid")
    (again,) = Midi().decode(tmp_path / "a.mid", Counter())
    assert again.dtype == np.uint16
    assert again.tolist() == events.tolist()


def test_hand_made_file_is_read_and_tempo_changes_are_followed(tmp_path):
    assert rows(read_notes(write(tmp_path / "a.mid", midi([C4])))) == [(0.0, 0.48, 60, 80)]
    # 1,000,000 microseconds a beat: half as fast.
    slow = b"\x00\xff\x51\x03\x0f\x42\x40"
    assert rows(read_notes(write(tmp_path / "a.mid", midi([slow, C4])))) == [(0.0, 0.96, 60, 80)]


def test_percussion_is_left_out(tmp_path):
    drum = b"\x00\x99\x24\x50" + b"\x83\x60\x89\x24\x00"
    assert rows(read_notes(write(tmp_path / "a.mid", midi([drum, C4])))) == [(0.0, 0.48, 60, 80)]
    with pytest.raises(CorruptFileError, match="no notes but those of percussion"):
        read_notes(write(tmp_path / "a.mid", midi([drum])))


def test_roll_is_the_documented_one():
    piece = notes((5.0, 5.3, 21, 80), (5.1, 5.2, 108, 80), (5.3, 5.4, 21, 80))
    roll = notes_to_roll(piece, 100)
    assert roll.shape == (4, 88)
    assert roll[:, 0].tolist() == [2, 1, 1, 2]
    assert roll[:, 87].tolist() == [0, 2, 0, 0]
    assert roll[:, 1:87].max() == 0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(21, 108)), min_size=1, max_size=30))
def test_roll_is_the_same_after_going_there_and_back(steps):
    roll = notes_to_roll(notes(*sorted((a / 10, (a + b) / 10, p, 80) for a, b, p in steps)), 100)
    back = roll_to_notes(roll, 100)
    assert np.array_equal(notes_to_roll(back, 100), roll)
    assert len(back) == (roll == 2).sum()


def test_roll_that_goes_on_sounding_after_silence_strikes_the_key():
    roll = np.zeros((5, 88), np.int64)
    roll[[1, 2, 4], 39] = 1
    assert rows(roll_to_notes(roll, 250)) == [(0.25, 0.75, 60, 80), (1.0, 1.25, 60, 80)]
    assert rows(roll_to_notes(np.zeros((0, 88), np.int64), 250)) == []


def test_roll_survives_a_file_and_counts_what_is_no_piano_key(tmp_path):
    write_notes(notes((0, 1, 60, 90), (0, 1, 10, 90), (2, 2.5, 72, 90)), tmp_path / "a.mid")
    changes = Counter()
    kind = PianoRoll(100)
    (tokens,) = kind.decode(tmp_path / "a.mid", changes)
    assert changes == {OFF_THE_PIANO: 1}
    assert (tokens.dtype, len(tokens)) == (np.uint8, 25 * 88)
    kind.write(tokens[:-30].astype(np.int64), tmp_path / "b.mid")
    (again,) = kind.decode(tmp_path / "b.mid", Counter())
    assert again.tolist() == tokens.tolist()
    with pytest.raises(DataError, match="token 3 is not one of the 3 of --kind piano-roll"):
        kind.write(np.array([3]), tmp_path / "c.mid")


def test_roll_is_whole_steps_and_has_their_axes():
    kind = make_kind("piano-roll", 880, {"step_ms": 50})
    assert kind == PianoRoll(50)
    assert (kind.axes(880), kind.record) == ([10, 88], 88)
    with pytest.raises(DataError, match=r"--context 900 with --kind piano-roll.*give --context 880"):
        make_kind("piano-roll", 900, {"step_ms": 50})
    with pytest.raises(DataError, match="steps of 0 ms"):
        PianoRoll(0)


FAR = b"\x00\x90\x3c\x50" + b"\xff\xff\xff\x7f\x80\x3c\x00"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as MIDI files do"),
        (b"RIFF" + midi([C4]), "does not begin as MIDI files do"),
        (midi([C4])[:20], "it ends after 0 of its 1 tracks"),
        (midi([C4, C4])[:-3], "it ends after 1 of its 2 tracks"),
        (midi([C4], promised=2), "it ends after 1 of its 2 tracks"),
        (midi([]), "no notes"),
        (midi([b""]), "no notes"),
        (midi([C4], division=0), "not in ticks of a beat"),
        (midi([C4], division=0xE728), "not in ticks of a beat"),
        (midi([FAR]), "its notes lie from 0 to 268435 s, not within 0 to 14,400 s"),
        (midi([b"\x00\x3c\x50\x00\x3c"]), "not sound MIDI|no notes"),
        (midi([b"\x00\xf0\x7f\x01"]), "not sound MIDI|no notes"),
    ],
    ids=["empty", "magic", "truncated", "second track", "missing track", "no tracks", "no notes", "no ticks", "film",
         "pause of days", "no status", "endless message"],
)  # fmt: skip
def test_corrupt_file_says_what_is_wrong(tmp_path, content, message):
    for kind in (Midi(), PianoRoll(100)):
        with pytest.raises(CorruptFileError, match=rf"a\.mid: .*({message})"):
            list(kind.decode(write(tmp_path / "a.mid", content), Counter()))


def test_noise_in_a_track_is_music_or_corrupt_but_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = midi([C4 + rng.bytes(rng.integers(1, 60)) + C4])
        try:
            (tokens,) = Midi().decode(write(tmp_path / "a.mid", content), Counter())
        except CorruptFileError:
            continue
        assert tokens.max() < 388


def test_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    write(tmp_path / "a.mid", midi([C4]))
    monkeypatch.setitem(sys.modules, "symusic", None)
    with pytest.raises(DataError, match=r"needs the package symusic .*pip install 'longstride\[midi\]'"):
        list(Midi().decode(tmp_path / "a.mid", Counter()))
