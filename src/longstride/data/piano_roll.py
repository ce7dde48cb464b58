"""Music as a piano roll: 88 keys a step, from MIDI and back.

A step is ``step_ms`` long, and 88 tokens, from the lowest key (A0, pitch 21) to the highest (C8, pitch 108):

    0    the key is silent
    1    it goes on sounding
    2    it is struck

So token t is key ``t % 88`` of step ``t // 88``, the model's position axes are (steps, 88), and windows begin with a
step. A file is one record, from its first note to its last. Times are rounded to steps, a note lasts at least one, and
velocity is lost. Keys that a piano does not have are left out; the count is shown. Any sequence of tokens is music: 1
after 0 strikes the key, and a step that is cut short is silent where it is missing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np

from longstride.data.kind import CorruptFileError, Kind
from longstride.data.notes import Notes, is_midi, read_notes, without_overlaps, write_notes
from longstride.errors import DataError

KEYS = 88
LOWEST_PITCH = 21
SILENT, SOUNDING, STRUCK = 0, 1, 2

# What a note is struck with when a roll is written as MIDI.
VELOCITY = 80

OFF_THE_PIANO = "notes are no keys of a piano, and were left out"


@dataclass(frozen=True)
class PianoRoll(Kind):
    """Pieces as rolls.

    Args:
        step_ms: how long a step lasts.
    """

    step_ms: int

    name: ClassVar[str] = "piano-roll"
    unit: ClassVar[str] = "cell"
    sample_suffix: ClassVar[str] = ".mid"

    def __post_init__(self) -> None:
        if not 1 <= self.step_ms <= 10_000:
            raise DataError(f"steps of {self.step_ms} ms in a piano roll: they must last 1 to 10,000 ms")

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:
        """With ``settings["step_ms"]``.

        Raises:
            DataError: the context is not a number of whole steps.
        """
        if context % KEYS:
            raise DataError(
                f"--context {context:,} with --kind piano-roll: a window is whole steps of {KEYS} keys; give --context "
                f"{max(context // KEYS, 1) * KEYS}"
            )
        return cls(settings["step_ms"])

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def record(self) -> int:
        return KEYS

    def axes(self, context: int) -> list[int]:
        """(steps, keys)."""
        return [context // KEYS, KEYS]

    def takes(self, file: PurePath) -> bool:
        """.mid and .midi."""
        return is_midi(file)

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """uint8[88 * steps], the whole piece.

        Raises:
            CorruptFileError, DataError: see `read_notes`; no note is on the piano.
        """
        notes = read_notes(path)
        on_piano = (notes.pitch >= LOWEST_PITCH) & (notes.pitch < LOWEST_PITCH + KEYS)
        if not on_piano.any():
            raise CorruptFileError(path, "none of its notes is a key of a piano")
        if missing := int((~on_piano).sum()):
            changes[OFF_THE_PIANO] += missing
        kept = Notes(notes.onset[on_piano], notes.offset[on_piano], notes.pitch[on_piano], notes.velocity[on_piano])
        yield notes_to_roll(kept, self.step_ms).reshape(-1)

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write a MIDI file of one piano."""
        steps = -(-len(tokens) // KEYS)
        roll = np.zeros(steps * KEYS, dtype=np.int64)
        roll[: len(tokens)] = self.check_tokens(tokens)
        write_notes(roll_to_notes(roll.reshape(-1, KEYS), self.step_ms), path)


def notes_to_roll(notes: Notes, step_ms: int) -> np.ndarray:
    """uint8[steps, 88]; all notes must be keys of a piano."""
    start = np.rint(notes.onset * (1000 / step_ms)).astype(np.int64)
    stop = np.maximum(np.rint(notes.offset * (1000 / step_ms)).astype(np.int64), start + 1)
    stop = without_overlaps(start, stop, notes.pitch)
    start, stop = start - start.min(), stop - start.min()
    roll = np.zeros((stop.max(), KEYS), dtype=np.uint8)
    for begin, end, key in zip(start, stop, notes.pitch - LOWEST_PITCH, strict=True):
        roll[begin:end, key] = SOUNDING
    roll[start, notes.pitch - LOWEST_PITCH] = STRUCK
    return roll


def roll_to_notes(roll: np.ndarray, step_ms: int) -> Notes:
    """The notes of int[steps, 88]."""
    silence = np.zeros((1, KEYS), dtype=roll.dtype)
    before = np.concatenate([silence, roll[:-1]]) if len(roll) else roll
    # A key that sounds after silence is struck, whatever the roll says.
    begins = (roll == STRUCK) | ((roll == SOUNDING) & (before == SILENT))
    ends = begins | (roll == SILENT)
    notes = []
    for key in range(KEYS):
        # Every note ends at the next end, or with the roll.
        started, ended = np.flatnonzero(begins[:, key]), np.append(np.flatnonzero(ends[:, key]), len(roll))
        stopped = ended[np.searchsorted(ended, started, side="right")]
        notes.append(np.stack([started, np.full_like(started, key + LOWEST_PITCH), stopped]))
    start, pitch, stop = np.concatenate(notes, axis=1)
    order = np.lexsort([pitch, start])
    seconds = step_ms / 1000
    return Notes(start[order] * seconds, stop[order] * seconds, pitch[order], np.full(len(order), VELOCITY))
