"""The splits of a source, copied once into a folder and read from there by memory mapping.

The folder holds ``train.bin``, ``validation.bin`` and ``test.bin`` (the plain bytes, files joined without anything in
between) and ``splits.json``. A run keeps its own copy, so a source that changes later changes neither a resumed
training nor an evaluation.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from longstride.data.bytes import SPLITS, ByteSource, Slice, split_source
from longstride.data.folders import written_whole
from longstride.errors import DataError

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PreparedData:
    """The splits in ``folder``.

    Args:
        folder: holds the three ``.bin`` files.
        source: where the bytes came from, in words.
        method: ``"by file"`` or ``"contiguously"``.
        files: the number of files that each split has a part of.
        bytes: the length of each split.
    """

    folder: Path
    source: str
    method: str
    files: dict[str, int]
    bytes: dict[str, int]

    def split(self, name: str) -> np.memmap:
        """uint8[bytes of the split], read from the disk as it is used."""
        return np.memmap(self.folder / f"{name}.bin", dtype=np.uint8, mode="r")

    def describe(self) -> str:
        """The sentences for the screen: source, splits, counts."""
        how = {
            "by file": "split by a hash of each file's path",
            "contiguously": "split at 90 % and 95 % of the bytes",
        }[self.method]
        parts = ", ".join(
            f"{name} {self.bytes[name]:,} bytes ({self.files[name]:,} {'file' if self.files[name] == 1 else 'files'})"
            for name in SPLITS
        )
        return f"Data: {self.source}, {how}: {parts}."

    @classmethod
    def open(cls, folder: Path) -> "PreparedData":
        """Data that `prepare` has written.

        Raises:
            DataError: they are missing or not what was written.
        """
        try:
            written = json.loads((folder / "splits.json").read_text())
            data = cls(folder, **written)
            actual = {name: (folder / f"{name}.bin").stat().st_size for name in SPLITS}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder} does not hold prepared data ({error}): train into a new --output") from error
        for name in SPLITS:
            if actual[name] != data.bytes[name]:
                raise DataError(
                    f"{folder / name}.bin has {actual[name]:,} bytes, but {data.bytes[name]:,} were written: "
                    "the copy is damaged; train into a new --output"
                )
        return data


def prepare(source: ByteSource, folder: Path, context: int) -> PreparedData:
    """Split ``source`` and copy it into ``folder``, completely or not at all.

    Args:
        context: bytes that the model sees at once; every split must have as many.

    Raises:
        DataError: too few bytes, or a file that cannot be read.
    """
    method, splits = split_source(source, shortest=context)
    with written_whole(folder) as unfinished:
        for name in SPLITS:
            _copy(source.root, splits[name], unfinished / f"{name}.bin")
        data = PreparedData(
            folder=folder,
            source=source.name,
            method=method,
            files={name: len(splits[name]) for name in SPLITS},
            bytes={name: (unfinished / f"{name}.bin").stat().st_size for name in SPLITS},
        )
        written = {key: value for key, value in asdict(data).items() if key != "folder"}
        (unfinished / "splits.json").write_text(json.dumps(written, indent=2) + "\n")
    return data


def _copy(root: Path, slices: list[Slice], target: Path) -> None:
    with target.open("wb") as output:
        for piece in slices:
            try:
                data = (root / piece.file).open("rb")
            except OSError as error:
                raise DataError(f"cannot read {root / piece.file}: {error.strerror}") from error
            with data:
                data.seek(piece.start)
                left = piece.stop - piece.start
                # A log file may grow, or shrink, while it is copied.
                while left and (chunk := data.read(min(left, COPY_BYTES))):
                    output.write(chunk)
                    left -= len(chunk)
