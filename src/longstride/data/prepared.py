"""The splits of a source, copied once into a folder and read from there by memory mapping.

The folder holds ``train.bin``, ``validation.bin`` and ``test.bin`` (the tokens, files joined without anything in
between), ``splits.json``, and for every kind but plain bytes ``train.records.npy`` and so on: where each image,
recording, piece or document begins. A run keeps its own copy, so a source that changes later changes neither a resumed
training nor an evaluation.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longstride.data.bytes import ByteSource
from longstride.data.catalogue import restore_kind
from longstride.data.decoded import DecodedSource, first_records
from longstride.data.folders import written_whole
from longstride.data.kind import Kind
from longstride.data.splits import SPLITS, Slice, Source, split_source
from longstride.errors import DataError


@dataclass(frozen=True)
class PreparedData:
    """The splits in ``folder``.

    Args:
        folder: holds the three ``.bin`` files.
        source: where the tokens came from, in words.
        method: ``"by file"``, ``"contiguously"`` or ``"as named"``.
        files: the number of files that each split has a part of.
        tokens: the length of each split; in bytes, for plain bytes.
        kind: what the tokens mean, as ``--kind`` calls it.
        settings: `Kind.settings`; empty for plain bytes.
    """

    folder: Path
    source: str
    method: str
    files: dict[str, int]
    tokens: dict[str, int]
    kind: str
    settings: Mapping[str, Any]

    @property
    def decoded_as(self) -> Kind | None:
        """The kind that turns tokens into files again; None for plain bytes, which are what they are."""
        return None if self.kind == "bytes" else restore_kind(self.kind, self.settings)

    @property
    def dtype(self) -> np.dtype:
        kind = self.decoded_as
        return np.dtype(np.uint8) if kind is None else kind.dtype

    @property
    def record(self) -> int:
        """Windows begin at multiples of so many tokens: an image's; 1 where they begin anywhere."""
        kind = self.decoded_as
        return 1 if kind is None else kind.record

    @property
    def unit(self) -> str:
        """What a token is called: byte, or `Kind.unit`."""
        kind = self.decoded_as
        return "byte" if kind is None else kind.unit

    def split(self, name: str) -> np.memmap:
        """uint8[tokens of the split], or uint16 for large vocabularies; read from the disk as it is used."""
        return np.memmap(self.folder / f"{name}.bin", dtype=self.dtype, mode="r")

    def records(self, name: str, tokens: int | None = None) -> np.ndarray:
        """int64[records + 1]: record r of the split is ``split(name)[records[r] : records[r + 1]]``.

        They are the boundaries that `longstride.attention_varlen` takes.

        Args:
            tokens: only those of so many tokens from the split's beginning, the last of which may be a part.

        Raises:
            DataError: plain bytes keep none.
        """
        path = self.folder / f"{name}.records.npy"
        if not path.exists():
            raise DataError(f"{self.folder} keeps no boundaries: plain bytes are joined; use --kind documents")
        records = np.load(path)
        return records if tokens is None else first_records(records, tokens)

    def describe(self) -> str:
        """The sentences for the screen: source, splits, counts."""
        how = {
            "by file": "split by a hash of each file's path",
            "contiguously": f"split at 90 % and 95 % of the {self.unit}s",
            "as named": "split as the files' names say",
        }[self.method]
        parts = ", ".join(
            f"{name} {self.tokens[name]:,} {self.unit}s "
            f"({self.files[name]:,} {'file' if self.files[name] == 1 else 'files'})"
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
            written_bytes = {name: data.tokens[name] * data.dtype.itemsize for name in SPLITS}
            actual_bytes = {name: (folder / f"{name}.bin").stat().st_size for name in SPLITS}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder} does not hold prepared data ({error}): train into a new --output") from error
        for name in SPLITS:
            if actual_bytes[name] != written_bytes[name]:
                raise DataError(
                    f"{folder / name}.bin has {actual_bytes[name]:,} bytes, but {written_bytes[name]:,} were written: "
                    "the copy is damaged; train into a new --output"
                )
        return data


def prepare(source: ByteSource | DecodedSource, folder: Path, context: int) -> PreparedData:
    """Split ``source`` and copy it into ``folder``, completely or not at all.

    Args:
        context: tokens that the model sees at once; every split must have as many.

    Raises:
        DataError: too few tokens, or a file that cannot be read.
    """
    method, splits = split_source(source, shortest=context)
    kind = source.kind if isinstance(source, DecodedSource) else None
    itemsize = 1 if kind is None else kind.dtype.itemsize
    with written_whole(folder) as unfinished:
        for name in SPLITS:
            _copy(source, splits[name], unfinished / f"{name}.bin")
            _write_records(source, splits[name], unfinished / f"{name}.records.npy")
        data = PreparedData(
            folder=folder,
            source=source.name,
            method=method,
            files={name: len(splits[name]) for name in SPLITS},
            tokens={name: (unfinished / f"{name}.bin").stat().st_size // itemsize for name in SPLITS},
            kind="bytes" if kind is None else kind.name,
            settings={} if kind is None else kind.settings(),
        )
        written = {key: value for key, value in asdict(data).items() if key != "folder"}
        (unfinished / "splits.json").write_text(json.dumps(written, indent=2) + "\n")
    return data


def _copy(source: Source, slices: list[Slice], target: Path) -> None:
    with target.open("wb") as output:
        for piece in slices:
            for chunk in source.chunks(piece):
                output.write(chunk)


def _write_records(source: Source, slices: list[Slice], target: Path) -> None:
    position, begins = 0, []
    for piece in slices:
        inside = source.records(piece)
        if inside is None:
            return
        begins.append(inside + position)
        position += piece.stop - piece.start
    np.save(target, np.concatenate([*begins, [position]]).astype(np.int64))
