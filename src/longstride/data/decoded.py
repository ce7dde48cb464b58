"""Files of a kind, decoded once into a cache that is keyed by their content.

The cache has one folder for each (kind, settings, paths and contents of the files): a file that changes, or another
sampling rate, makes another folder, and the same data elsewhere or under another name use the same one. It holds

    tokens.bin      the tokens of all files joined, in `Kind.dtype`
    records.npy     int64[records + 1]: record r is tokens[records[r] : records[r + 1]]
    decoded.json    kind, settings, files with their tokens, corrupt files with their reasons, changes

and may be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from longstride.data.bytes import CHUNK_BYTES, walk
from longstride.data.catalogue import restore_kind
from longstride.data.folders import UNFINISHED, written_whole
from longstride.data.kind import CorruptFileError, Kind
from longstride.data.splits import Slice
from longstride.errors import ArgumentError, DataError

# Part of every key: raise it when decoding comes to give other tokens.
FORMAT = 1

ON_CORRUPT = ("skip", "stop")

# So many corrupt files are named one by one; the count tells of the others.
NAMED_CORRUPT_FILES = 20


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/longstride/data``, or ``~/.cache/longstride/data``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "longstride" / "data"


@dataclass(frozen=True)
class DecodedSource:
    """The tokens of files of a kind, read from the cache: a `Source`.

    Args:
        name: what a reader of the screen should see.
        folder: the folder in the cache.
        kind: how the files were decoded, with what it has learnt from them.
        files: relative paths of the files that were read, sorted.
        tokens: the number of tokens of each of them.
        corrupt: (path, what is wrong) of the files that were left out.
        changes: what decoding changed, and how often.
    """

    name: str
    folder: Path
    kind: Kind
    files: tuple[Path, ...]
    tokens: tuple[int, ...]
    corrupt: tuple[tuple[str, str], ...]
    changes: tuple[tuple[str, int], ...]

    @property
    def unit(self) -> str:
        return f"{self.kind.unit}s"

    @property
    def record(self) -> int:
        return self.kind.record

    def lengths(self) -> list[int]:
        """The tokens of every file."""
        return list(self.tokens)

    def named_split(self, file: PurePath) -> str | None:
        """See `Kind.named_split`."""
        return self.kind.named_split(file)

    def chunks(self, piece: Slice) -> Iterator[bytes]:
        """The tokens of a piece, from the memory map."""
        start = self._start(piece)
        joined = self._joined()[start : start + piece.stop - piece.start]
        step = CHUNK_BYTES // self.kind.dtype.itemsize
        for first in range(0, len(joined), step):
            yield joined[first : first + step].tobytes()

    def records(self, piece: Slice) -> np.ndarray:
        """int64[n]: where records begin in the piece; one that began before it begins at 0."""
        start = self._start(piece)
        begins = np.load(self.folder / "records.npy", mmap_mode="r")
        first, last = np.searchsorted(begins, [start, start + piece.stop - piece.start])
        inside = np.asarray(begins[first:last]) - start
        return inside if len(inside) and inside[0] == 0 else np.concatenate([[0], inside])

    def read(self, limit: int | None = None) -> np.ndarray:
        """[tokens] of `Kind.dtype`, memory-mapped: all files joined, or their first ``limit`` tokens."""
        return self._joined()[:limit]

    def boundaries(self, tokens: int) -> np.ndarray:
        """int64[records + 1]: where records begin in ``read(tokens)``, and its end."""
        return first_records(np.load(self.folder / "records.npy"), tokens)

    def _joined(self) -> np.memmap:
        return np.memmap(self.folder / "tokens.bin", dtype=self.kind.dtype, mode="r")

    def _start(self, piece: Slice) -> int:
        return self._offsets[piece.file] + piece.start

    @cached_property
    def _offsets(self) -> dict[Path, int]:
        """Where each file begins in tokens.bin; kept, because a folder may hold a million images."""
        begins = np.cumsum([0, *self.tokens[:-1]]).tolist()
        return dict(zip(self.files, begins, strict=True))

    def describe(self) -> list[str]:
        """Sentences for the screen: where the decoded data lie, what was changed, which files were corrupt."""
        lines = [f"{count:,} {what}." for what, count in self.changes]
        lines += [f"Skipped {file}: {what}." for file, what in self.corrupt[:NAMED_CORRUPT_FILES]]
        if self.corrupt:
            total = len(self.corrupt) + len(self.files)
            lines.append(f"{len(self.corrupt):,} of {total:,} files were corrupt and are left out.")
        return lines


def first_records(records: np.ndarray, tokens: int) -> np.ndarray:
    """Those of records, int64[records + 1], that begin in the first ``tokens`` tokens, and the end of these."""
    return np.append(records[records < tokens], tokens)


def decode_source(path: Path, kind: Kind, *, cache: Path | None = None, on_corrupt: str = "skip") -> DecodedSource:
    """The file or folder ``path`` as tokens, decoded now or found in the cache, with a bar on a terminal.

    Of a folder, the files that the kind takes count, at any depth, except hidden ones.

    Args:
        cache: the folder of all caches; None for `cache_folder`.
        on_corrupt: ``"skip"`` to leave corrupt files out, ``"stop"`` to raise at the first.

    Raises:
        ArgumentError: another ``on_corrupt``.
        DataError: nothing to read, or a corrupt file that is to stop.
    """
    if on_corrupt not in ON_CORRUPT:
        raise ArgumentError(f"--on-corrupt {on_corrupt}: it must be one of {', '.join(ON_CORRUPT)}")
    root, files = _list(path, kind)
    cache = cache_folder() if cache is None else cache
    folder = cache / _key(root, files, kind)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # A room for each process: two runs that start on the same data do not meet before the last rename.
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache) as room:
            with written_whole(Path(room, folder.name)) as unfinished:
                _decode(root, files, kind, unfinished, stop=on_corrupt == "stop")
            try:
                Path(room, folder.name).rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    source = _open(folder, str(path))
    if source.corrupt and on_corrupt == "stop":
        file, what = source.corrupt[0]
        raise _stopped(root / file, what)
    if not source.files and not source.corrupt:
        raise DataError(f"{path} is empty (0 {source.unit}): put data there, or point --data elsewhere")
    if not source.files:
        raise DataError(
            f"{path} holds no sound file for --kind {kind.name}: {len(source.corrupt):,} are corrupt, the first being "
            f"{root / source.corrupt[0][0]} ({source.corrupt[0][1]}); give others, or another --kind"
        )
    return source


def _list(path: Path, kind: Kind) -> tuple[Path, list[Path]]:
    if not path.exists():
        raise DataError(f"there is no file or folder {path}: check --data")
    if not path.is_dir():
        return path.parent, [Path(path.name)]
    files = sorted(file for file in walk(path) if kind.takes(file))
    if not files:
        raise DataError(
            f"the folder {path} holds no file that --kind {kind.name} reads: point --data elsewhere, or choose another "
            "--kind"
        )
    return path, files


def _key(root: Path, files: list[Path], kind: Kind) -> str:
    total = hashlib.sha256(json.dumps([FORMAT, kind.name, kind.settings()], sort_keys=True).encode())
    with _bar(root, files, "checking") as bar:
        for file in files:
            with (root / file).open("rb") as data:
                content = hashlib.file_digest(data, "sha256")
            # Lengths cannot run into one another: the path is followed by a byte that no path has.
            total.update(file.as_posix().encode(errors="surrogateescape") + b"\0" + content.digest())
            bar.update((root / file).stat().st_size)
    return f"{kind.name}-{total.hexdigest()[:32]}"


def _decode(root: Path, files: list[Path], kind: Kind, folder: Path, *, stop: bool) -> None:
    corrupt: dict[Path, str] = {}
    changes: Counter[str] = Counter()
    kind = kind.fitted([root / file for file in files])
    tokens: dict[Path, int] = {}
    ends = [0]
    with (folder / "tokens.bin").open("wb") as output, _bar(root, files, f"reading {kind.name}") as bar:
        for file in files:
            begin, records = ends[-1], len(ends)
            changed: Counter[str] = Counter()
            try:
                for record in kind.decode(root / file, changed):
                    assert len(record), file
                    output.write(np.ascontiguousarray(record, dtype=kind.dtype).data)
                    ends.append(ends[-1] + len(record))
                # A file of empty documents has nothing to read.
                if ends[-1] > begin:
                    tokens[file] = ends[-1] - begin
                changes += changed
            except CorruptFileError as error:
                if stop:
                    raise _stopped(root / file, error.what) from error
                corrupt[file] = error.what
                # What came before the damage goes, too: a file counts completely or not at all.
                del ends[records:]
                output.seek(begin * kind.dtype.itemsize)
                output.truncate()
            bar.update((root / file).stat().st_size)
    np.save(folder / "records.npy", np.array(ends, dtype=np.int64))
    written = {
        "kind": kind.name,
        "settings": kind.settings(),
        "files": [[file.as_posix(), count] for file, count in tokens.items()],
        "corrupt": [[file.as_posix(), what] for file, what in corrupt.items()],
        "changes": list(changes.items()),
    }
    (folder / "decoded.json").write_text(json.dumps(written) + "\n")


def _open(folder: Path, name: str) -> DecodedSource:
    try:
        written = json.loads((folder / "decoded.json").read_text())
        source = DecodedSource(
            name=name,
            folder=folder,
            kind=restore_kind(written["kind"], written["settings"]),
            files=tuple(Path(file) for file, _ in written["files"]),
            tokens=tuple(count for _, count in written["files"]),
            corrupt=tuple((file, what) for file, what in written["corrupt"]),
            changes=tuple((what, count) for what, count in written["changes"]),
        )
        actual = (folder / "tokens.bin").stat().st_size
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the cache {folder} is damaged ({error}): delete that folder and start again") from error
    if actual != sum(source.tokens) * source.kind.dtype.itemsize:
        raise DataError(
            f"the cache {folder} is damaged (tokens.bin has {actual:,} bytes): delete that folder and start again"
        )
    return source


def _stopped(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(path, f"{what}; repair or remove the file, or leave it out with --on-corrupt skip")


def _bar(root: Path, files: list[Path], what: str) -> tqdm:
    total = sum((root / file).stat().st_size for file in files)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
