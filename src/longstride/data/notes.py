"""Notes of a MIDI file in seconds, and back: what the two musical kinds, events and piano rolls, have in common.

All instruments are played by one; percussion (channel 10) is left out, since its pitches name drums. Tempo changes are
followed, so that times are seconds. The pedal, bends and other controls are not kept.
"""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from longstride.data.kind import CorruptFileError
from longstride.errors import DataError

SUFFIXES = frozenset({".mid", ".midi"})

# A few damaged bytes can claim a pause of years, which would be a billion tokens.
LONGEST_S = 4 * 3600

# Times are written at 1,000 ticks a second: 500 a beat, 120 beats a minute.
TICKS_PER_BEAT = 500
BEATS_PER_MINUTE = 120.0


@dataclass(frozen=True, eq=False)
class Notes:
    """Notes in order of their onset, then pitch.

    Args:
        onset, offset: float64[notes], seconds; onset < offset.
        pitch: int64[notes], 0 to 127; 60 is middle C.
        velocity: int64[notes], 1 to 127.
    """

    onset: np.ndarray
    offset: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    def __len__(self) -> int:
        return len(self.onset)


def is_midi(file: PurePath) -> bool:
    """Whether a file's name ends as those of MIDI files do."""
    return file.suffix.lower() in SUFFIXES


def read_notes(path: Path) -> Notes:
    """The notes of a MIDI file.

    Raises:
        CorruptFileError: damaged, cut short, without notes, or hours long.
        DataError: the package symusic is missing.
    """
    symusic = _symusic()
    _check_chunks(path)
    try:
        score = symusic.Score(path).to("second")
        tracks = [track.notes.numpy() for track in score.tracks if not track.is_drum]
    except (RuntimeError, ValueError) as error:
        raise CorruptFileError(path, f"not sound MIDI ({str(error).split(': ')[-1]})") from error
    columns = [
        np.concatenate([track[name].astype(np.float64) for track in tracks]) if tracks else np.empty(0)
        for name in ("time", "duration", "pitch", "velocity")
    ]
    onset, duration, pitch, velocity = columns
    if not len(onset):
        raise CorruptFileError(path, "it holds no notes but those of percussion, if any")
    offset = onset + duration
    # Written so that what is not a number is refused, too.
    if not (onset.min() >= 0 and offset.max() <= LONGEST_S):
        raise CorruptFileError(
            path, f"its notes lie from {onset.min():g} to {offset.max():g} s, not within 0 to {LONGEST_S:,} s"
        )
    order = np.lexsort([offset, pitch, onset])
    return Notes(onset[order], offset[order], pitch[order].astype(np.int64), velocity[order].astype(np.int64))


def write_notes(notes: Notes, path: Path) -> None:
    """Write a MIDI file of one piano, in milliseconds."""
    symusic = _symusic()
    score = symusic.Score(TICKS_PER_BEAT)
    score.tempos.append(symusic.Tempo(0, qpm=BEATS_PER_MINUTE))
    track = symusic.Track(name="piano", program=0)
    onset_ms = np.rint(notes.onset * 1000).astype(np.int64)
    offset_ms = np.rint(notes.offset * 1000).astype(np.int64)
    for start, stop, pitch, velocity in zip(onset_ms, offset_ms, notes.pitch, notes.velocity, strict=True):
        track.notes.append(
            symusic.Note(time=int(start), duration=int(stop - start), pitch=int(pitch), velocity=int(velocity))
        )
    score.tracks.append(track)
    score.dump_midi(path)


def without_overlaps(start: np.ndarray, stop: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """``stop``, cut off where the same key is struck again.

    Args:
        start, stop, pitch: int64[notes], in steps; sorted by start.
    """
    stop = stop.copy()
    latest: dict[int, int] = {}
    for note, key in enumerate(pitch.tolist()):
        if key in latest:
            stop[latest[key]] = min(stop[latest[key]], start[note])
        latest[key] = note
    return stop


def _check_chunks(path: Path) -> None:
    """That the file is a header and as many whole tracks as it promises."""
    content = path.read_bytes()
    if content[:8] != b"MThd\0\0\0\6" or len(content) < 14:
        raise CorruptFileError(path, "it does not begin as MIDI files do")
    division = int.from_bytes(content[12:14], "big")
    if division == 0 or division & 0x8000:
        raise CorruptFileError(path, "its times are not in ticks of a beat")
    promised, whole, position = int.from_bytes(content[10:12], "big"), 0, 14
    while whole < promised:
        kind, length = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "big")
        position += 8 + length
        if position > len(content):
            raise CorruptFileError(path, f"it ends after {whole} of its {promised} tracks")
        whole += kind == b"MTrk"


def _symusic() -> Any:
    try:
        import symusic
    except ImportError as error:
        raise DataError(f"MIDI needs the package symusic ({error}): pip install 'longstride[midi]'") from error
    return symusic
