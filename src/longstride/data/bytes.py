"""Where the bytes come from. Any file or folder is data: a token is a byte."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import ClassVar

import numpy as np

from longstride.data.splits import Slice
from longstride.errors import DataError

CHUNK_BYTES = 1 << 20

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

    unit: ClassVar[str] = "bytes"
    record: ClassVar[int] = 1

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

    def named_split(self, file: PurePath) -> str | None:  # noqa: ARG002 (a Source has it)
        """None: to bytes, a file's name says nothing."""
        return None

    def chunks(self, piece: Slice) -> Iterator[bytes]:
        """The bytes of a piece; fewer, if the file shrinks meanwhile, as a log may.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            data = (self.root / piece.file).open("rb")
        except OSError as error:
            raise DataError(f"cannot read {self.root / piece.file}: {error.strerror}") from error
        with data:
            data.seek(piece.start)
            left = piece.stop - piece.start
            while left and (chunk := data.read(min(left, CHUNK_BYTES))):
                yield chunk
                left -= len(chunk)

    def records(self, piece: Slice) -> None:  # noqa: ARG002 (a Source has it)
        """None: bytes are joined without a trace of where files begin; ``--kind documents`` keeps that."""
        return None


def standard_library() -> ByteSource:
    """The source of Python's own standard library on this machine: ``*.py`` without tests and installed packages.

    Raises:
        DataError: this Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        file
        for file in sorted(walk(root, FOLDERS_LEFT_OUT))
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
        source = ByteSource(str(path), path, tuple(sorted(walk(path))))
        if not source.files:
            raise DataError(f"the folder {path} holds no files: put data there, or point --data elsewhere")
    else:
        source = ByteSource(str(path), path.parent, (Path(path.name),))
    if sum(source.lengths()) == 0:
        raise DataError(f"{path} is empty (0 bytes): put data there, or point --data elsewhere")
    return source


def walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The regular files below ``root``, relative to it, in no order; neither hidden ones nor those in ``left_out``."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file.relative_to(root)
