"""Which part of the data is for training, validation and test.

The split never depends on chance or on the order of a directory listing, so the same data are split in the same way
on every machine and on every day.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np

from longstride.errors import DataError

SPLITS = ("train", "validation", "test")

# The end of each split on the unit interval: 90 %, 5 %, 5 %.
SPLIT_ENDS = (0.90, 0.95, 1.0)

# With fewer files than this, one large file would decide what is in the validation and the test split.
FEWEST_FILES_TO_SPLIT = 20


@dataclass(frozen=True)
class Slice:
    """Tokens ``start`` to ``stop`` of one file."""

    file: Path
    start: int
    stop: int


class Source(Protocol):
    """Files whose tokens can be counted and read piece by piece."""

    @property
    def name(self) -> str:
        """What a reader of the screen should see."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Relative paths, sorted; the order in which they are joined."""
        ...

    @property
    def unit(self) -> str:
        """What tokens are called, in the plural: bytes for plain bytes."""
        ...

    @property
    def record(self) -> int:
        """A split within a file begins at a multiple of so many tokens."""
        ...

    def lengths(self) -> list[int]:
        """The tokens of every file."""
        ...

    def named_split(self, file: PurePath) -> str | None:
        """The split that a file's name or place asks for, or None."""
        ...

    def chunks(self, piece: Slice) -> Iterator[bytes]:
        """The tokens of a piece, as they lie in memory, a bounded number of bytes at a time."""
        ...

    def records(self, piece: Slice) -> np.ndarray | None:
        """int64[n]: where in the piece records begin, the piece's own start (0) included; None if that is not kept."""
        ...


def assign_split(file: PurePath) -> str:
    """The split of a whole file, from a hash of its relative path alone: it stays when other files come and go."""
    digest = hashlib.sha256(file.as_posix().encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in zip(SPLITS, SPLIT_ENDS, strict=True) if position < end)


def split_source(source: Source, shortest: int) -> tuple[str, dict[str, list[Slice]]]:
    """Which tokens belong to which split.

    Files whose names ask for a split get it: ``test_batch.bin``, ``val/piece.mid``. With test files alone, or with
    validation files alone (which are the test then, as with ImageNet), validation is the last 5 % of the rest.
    Otherwise a folder of many files is split by file; a single file, a folder of few files, or one where splitting by
    file would leave a split shorter than a context, at 90 % and 95 % of its tokens.

    Args:
        shortest: tokens that every split must have, which is the context of the model.

    Returns:
        ``"as named"``, ``"by file"`` or ``"contiguously"``, and the slices of every split in reading order.

    Raises:
        DataError: the data are too short for that.
    """
    whole = [Slice(file, 0, length) for file, length in zip(source.files, source.lengths(), strict=True)]
    named = [source.named_split(piece.file) for piece in whole]
    if "test" in named or "validation" in named:
        splits = _split_as_named(whole, named, source.record)
        _check_lengths(source, splits, shortest)
        return "as named", splits
    if len(whole) >= FEWEST_FILES_TO_SPLIT:
        by_file: dict[str, list[Slice]] = {split: [] for split in SPLITS}
        for piece in whole:
            by_file[assign_split(piece.file)].append(piece)
        if all(_length(by_file[split]) >= shortest for split in SPLITS):
            return "by file", by_file
    total = _length(whole)
    contiguous = dict(zip(SPLITS, _cut(whole, [int(total * end) for end in SPLIT_ENDS], source.record), strict=True))
    _check_lengths(source, contiguous, shortest)
    return "contiguously", contiguous


def _split_as_named(whole: list[Slice], named: list[str | None], record: int) -> dict[str, list[Slice]]:
    splits: dict[str, list[Slice]] = {split: [] for split in SPLITS}
    for piece, split in zip(whole, named, strict=True):
        splits[split or "train"].append(piece)
    if not splits["test"]:
        splits["test"], splits["validation"] = splits["validation"], []
    if not splits["validation"]:
        total = _length(splits["train"])
        splits["train"], splits["validation"] = _cut(splits["train"], [int(total * 0.95), total], record)
    return splits


def _cut(whole: list[Slice], ends: list[int], record: int) -> list[list[Slice]]:
    """The pieces up to each of ``ends``, in tokens of all files joined, moved down to the beginning of a record."""
    bounds = [0] + [end // record * record for end in ends]
    parts: list[list[Slice]] = [[] for _ in ends]
    position = 0
    for piece in whole:
        for part, low, high in zip(parts, bounds[:-1], bounds[1:], strict=True):
            start, stop = max(low - position, 0), min(high - position, piece.stop)
            if start < stop:
                part.append(Slice(piece.file, start, stop))
        position += piece.stop
    return parts


def _length(pieces: list[Slice]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _check_lengths(source: Source, splits: dict[str, list[Slice]], shortest: int) -> None:
    for split in SPLITS:
        length = _length(splits[split])
        if length < shortest:
            total = sum(source.lengths())
            possible = length // source.record * source.record
            shorter = f", or a --context of at most {possible:,}" if possible > 1 else ""
            raise DataError(
                f"{source.name} holds {total:,} {source.unit}, of which the {split} split gets {length:,}: fewer than "
                f"the context of {shortest:,}; give more data{shorter}"
            )
