"""Where the bytes come from, and which of them are for training, validation and test.

Any file or folder is data: a token is a byte. The split never depends on chance or on the order of a directory
listing, so the same data are split in the same way on every machine and on every day.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from longstride.errors import DataError

SPLITS = ("train", "validation", "test")

# The end of each split on the unit interval: 90 %, 5 %, 5 %.
SPLIT_ENDS = (0.90, 0.95, 1.0)

# With fewer files than this, one large file would decide what is in the validation and the test split.
FEWEST_FILES_TO_SPLIT = 20

# Python's own tests and what was installed beside it are not the standard library's source.
FOLDERS_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class ByteSource:
    """Files that are read as bytes, one after another.

    Args:
        name: what a reader of the screen should see, such as ``essays.txt``.
        root: the folder that ``files`` are relative to.
        files: paths relative to ``root``, sorted; the order in which they are joined.
    """

    name: str
    root: Path
    files: tuple[Path, ...]

    def lengths(self) -> list[int]:
        """The bytes of every file."""
        return [(self.root / file).stat().st_size for file in self.files]

    def read(self, limit: int | None = None) -> np.ndarray:
        """uint8[bytes]: all files joined, or their first ``limit`` bytes."""
        parts = []
        left = sum(self.lengths()) if limit is None else limit
        for file in self.files:
            if left > 0:
                part = np.fromfile(self.root / file, dtype=np.uint8, count=left)
                parts.append(part)
                left -= len(part)
        return np.concatenate(parts)


def standard_library() -> ByteSource:
    """The source of Python's own standard library on this machine: ``*.py`` without tests and installed packages.

    Raises:
        DataError: this Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        file
        for file in sorted(_walk(root, FOLDERS_LEFT_OUT))
        # The record of how this Python was built is not source, and differs from machine to machine.
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    )
    if not files:
        raise DataError(f"{root} holds no Python source to train on: give a file or folder of your own with --data")
    return ByteSource(f"the source of Python's standard library ({root})", root, files)


def open_source(path: Path | None) -> ByteSource:
    """The file or folder ``path``, or the standard library's source for None.

    Every regular file of a folder counts, at any depth, except hidden ones (their names begin with a dot).

    Raises:
        DataError: the path does not exist or holds no bytes.
    """
    if path is None:
        return standard_library()
    if not path.exists():
        raise DataError(
            f"there is no file or folder {path}: check --data (or leave it out, to train on Python's source)"
        )
    if path.is_dir():
        source = ByteSource(str(path), path, tuple(sorted(_walk(path, frozenset()))))
        if not source.files:
            raise DataError(f"the folder {path} holds no files: put data there, or point --data elsewhere")
    else:
        source = ByteSource(str(path), path.parent, (Path(path.name),))
    if sum(source.lengths()) == 0:
        raise DataError(f"{path} is empty (0 bytes): put data there, or point --data elsewhere")
    return source


def _walk(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file.relative_to(root)


def assign_split(file: PurePath) -> str:
    """The split of a whole file, from a hash of its relative path alone: it stays when other files come and go."""
    digest = hashlib.sha256(file.as_posix().encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in zip(SPLITS, SPLIT_ENDS, strict=True) if position < end)


@dataclass(frozen=True)
class Slice:
    """Bytes ``start`` to ``stop`` of one file."""

    file: Path
    start: int
    stop: int


def split_source(source: ByteSource, shortest: int) -> tuple[str, dict[str, list[Slice]]]:
    """Which bytes belong to which split.

    A folder of many files is split by file. A single file, a folder of few files, or one where splitting by file
    would leave a split shorter than a context, is split at 90 % and 95 % of its bytes.

    Args:
        shortest: bytes that every split must have, which is the context of the model.

    Returns:
        ``"by file"`` or ``"contiguously"``, and the slices of every split in reading order.

    Raises:
        DataError: the data are too short for that.
    """
    lengths = source.lengths()
    if len(source.files) >= FEWEST_FILES_TO_SPLIT:
        by_file: dict[str, list[Slice]] = {split: [] for split in SPLITS}
        for file, length in zip(source.files, lengths, strict=True):
            by_file[assign_split(file)].append(Slice(file, 0, length))
        if all(sum(piece.stop for piece in by_file[split]) >= shortest for split in SPLITS):
            return "by file", by_file
    contiguous = _split_contiguously(source, lengths)
    for split in SPLITS:
        length = sum(piece.stop - piece.start for piece in contiguous[split])
        if length < shortest:
            raise DataError(
                f"{source.name} holds {sum(lengths):,} bytes, of which the {split} split gets {length:,}: fewer than "
                f"the context of {shortest:,}; give more data, or a --context of at most {length:,}"
            )
    return "contiguously", contiguous


def _split_contiguously(source: ByteSource, lengths: list[int]) -> dict[str, list[Slice]]:
    total = sum(lengths)
    bounds = [0] + [int(total * end) for end in SPLIT_ENDS]
    splits: dict[str, list[Slice]] = {split: [] for split in SPLITS}
    position = 0
    for file, length in zip(source.files, lengths, strict=True):
        for split, low, high in zip(SPLITS, bounds[:-1], bounds[1:], strict=True):
            start, stop = max(low - position, 0), min(high - position, length)
            if start < stop:
                splits[split].append(Slice(file, start, stop))
        position += length
    return splits
