"""Music as events: the performance vocabulary of 388 tokens, from MIDI and back.

    0 to 127      note on, of the pitch (60 is middle C), at the velocity that was last set
    128 to 255    note off, of pitch token - 128
    256 to 355    time moves on by (token - 255) * 10 ms: 10 ms to 1 s
    356 to 387    velocity is in bin token - 356 from now on: bin b is velocities 4 * b to 4 * b + 3

A file is one record. Times are rounded to 10 ms; a note lasts at least one step, and ends when its key is struck again.
At each time notes end before others begin, both from low to high, and longer pauses are several moves of 1 s. The loop
that reads events back is `events_to_notes`: any sequence of tokens is music, as what means nothing (a note off without
its note on) is passed over.

Source: Oore, Simon, Dieleman, Eck, Simonyan 2018, "This Time with Feeling: Learning Expressive Musical Performance",
section 4.2, with the Music Transformer's (Huang et al. 2018) 10 ms and 32 velocities.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np

from longstride.data.kind import Kind
from longstride.data.notes import Notes, is_midi, read_notes, without_overlaps, write_notes

NOTE_ON = 0
NOTE_OFF = 128
TIME_SHIFT = 256
VELOCITY = 356
VOCABULARY = 388

STEP_MS = 10
LONGEST_SHIFT_STEPS = VELOCITY - TIME_SHIFT
VELOCITIES_IN_BIN = 4


@dataclass(frozen=True)
class Midi(Kind):
    """Pieces as events. It has no settings."""

    name: ClassVar[str] = "midi"
    unit: ClassVar[str] = "event"
    sample_suffix: ClassVar[str] = ".mid"

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 (it has none)
        """The one there is."""
        return cls()

    @classmethod
    def surely(cls, file: PurePath) -> bool:
        """.mid and .midi."""
        return is_midi(file)

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    def takes(self, file: PurePath) -> bool:
        """The same files as `surely`."""
        return is_midi(file)

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:  # noqa: ARG002 (it counts nothing)
        """uint16[events], the whole piece.

        Raises:
            CorruptFileError, DataError: see `read_notes`.
        """
        yield notes_to_events(read_notes(path))

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write a MIDI file of one piano."""
        write_notes(events_to_notes(self.check_tokens(tokens)), path)


def notes_to_events(notes: Notes) -> np.ndarray:
    """uint16[events]: the notes in the vocabulary of this module, up to the last note off."""
    start = np.rint(notes.onset * (1000 / STEP_MS)).astype(np.int64)
    stop = np.maximum(np.rint(notes.offset * (1000 / STEP_MS)).astype(np.int64), start + 1)
    # Rounding may have put one before another that began earlier and is higher.
    order = np.lexsort([stop, notes.pitch, start])
    start, stop, pitch = start[order], stop[order], notes.pitch[order]
    velocity = notes.velocity[order] // VELOCITIES_IN_BIN
    stop = without_overlaps(start, stop, pitch)
    # What was struck twice at once is one note.
    kept = np.flatnonzero(stop > start)
    events = [(stop[note], 0, pitch[note], 0) for note in kept]
    events += [(start[note], 1, pitch[note], velocity[note]) for note in kept]
    tokens: list[int] = []
    now, bin_now = 0, -1
    for step, is_on, key, wanted in sorted(events):
        pause = step - now
        tokens += [TIME_SHIFT + LONGEST_SHIFT_STEPS - 1] * (pause // LONGEST_SHIFT_STEPS)
        if pause % LONGEST_SHIFT_STEPS:
            tokens.append(TIME_SHIFT - 1 + pause % LONGEST_SHIFT_STEPS)
        now = step
        if is_on and wanted != bin_now:
            tokens.append(VELOCITY + wanted)
            bin_now = wanted
        tokens.append((NOTE_ON if is_on else NOTE_OFF) + key)
    return np.array(tokens, dtype=np.uint16)


def events_to_notes(tokens: np.ndarray) -> Notes:
    """The notes of int[events]; what still sounds at the end stops there, after at least one step.

    A bin stands for its third velocity: 4 * b + 2. Before the first velocity it is 64's.
    """
    step, velocity = 0, 16 * VELOCITIES_IN_BIN + 2
    sounding: dict[int, tuple[int, int]] = {}
    notes: list[tuple[int, int, int, int]] = []

    def end(pitch: int) -> None:
        started, loudness = sounding.pop(pitch)
        if step > started:
            notes.append((started, pitch, step, loudness))

    for token in tokens.tolist():
        if token < NOTE_OFF:
            if token in sounding:
                end(token)
            sounding[token] = (step, velocity)
        elif token < TIME_SHIFT:
            if token - NOTE_OFF in sounding:
                end(token - NOTE_OFF)
        elif token < VELOCITY:
            step += token - TIME_SHIFT + 1
        else:
            velocity = (token - VELOCITY) * VELOCITIES_IN_BIN + 2
    step += any(started == step for started, _ in sounding.values())
    for pitch in list(sounding):
        end(pitch)
    columns = np.array(sorted(notes), dtype=np.int64).reshape(-1, 4)
    seconds = STEP_MS / 1000
    return Notes(columns[:, 0] * seconds, columns[:, 2] * seconds, columns[:, 1], columns[:, 3])
