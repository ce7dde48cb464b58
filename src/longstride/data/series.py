"""Time series from CSV files as tokens: every number is put into a bin of its column, and comes back as its centre.

A row of n columns is n tokens, in the order of the columns, so windows begin with a row. Token 0 is a missing value:
an empty cell, or one that is no finite number, such as ``NA``. Tokens 1 to ``bins`` are the bins of the cell's column,
from low to high, each column having its own:

    quantile   every bin has about as many of the column's values; its centre is their median
    uniform    all bins are equally wide, from the column's least value to its greatest; their centres are their middles

A value on the edge of two bins is in the upper one. With quantiles, a value that fills several bins, such as the zeros
of a rain gauge, is in the last of them, and comes back exactly if that bin has no others. The bins are those of all
files together, test rows included: they say how numbers are written, not what comes next. So all numbers are in memory
once, while the bins are made.

Columns of which less than half is numbers, such as dates, are left out and named. The first row may name the columns;
the delimiter is a comma, semicolon, tab or bar. All files must have the same columns. A file is one record.
"""

import csv
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np

from longstride.data.kind import CorruptFileError, Kind
from longstride.errors import DataError

SUFFIXES = frozenset({".csv", ".tsv"})
DELIMITERS = ",;\t|"
BINNINGS = ("quantile", "uniform")
MISSING = 0

MOST_BINS = 65_535
LARGEST = 1e300
MOST_COLUMNS = 4_096
# A column is a series if so much of it is numbers.
LEAST_NUMBERS = 0.5

NO_NUMBERS = "cells were empty or no numbers, and are missing values"


@dataclass(frozen=True)
class Series(Kind):
    """Rows of numbers. `fitted` fills in what begins with ``columns``.

    Args:
        bins: bins of each column.
        binning: one of `BINNINGS`.
        header: all columns of the files, by name.
        columns: those that are series.
        edges: float[columns, bins - 1]: bin b of a column is edges[b - 1] <= x < edges[b].
        centres: float[columns, bins]: what a bin's token stands for.
    """

    bins: int
    binning: str
    header: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    edges: tuple[tuple[float, ...], ...] = ()
    centres: tuple[tuple[float, ...], ...] = ()

    name: ClassVar[str] = "csv"
    unit: ClassVar[str] = "value"
    sample_suffix: ClassVar[str] = ".csv"

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= MOST_BINS:
            raise DataError(f"{self.bins} bins for the values of a CSV file: take 2 to {MOST_BINS:,}")
        if self.binning not in BINNINGS:
            raise DataError(f"binning {self.binning!r}: it must be one of {', '.join(BINNINGS)}")
        # JSON has given lists back.
        for field in ("header", "columns"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("edges", "centres"):
            object.__setattr__(self, field, tuple(tuple(row) for row in getattr(self, field)))

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 (any context will do)
        """With ``settings["bins"]`` and ``settings["binning"]``."""
        return cls(settings["bins"], settings["binning"])

    @property
    def vocab_size(self) -> int:
        return self.bins + 1

    @property
    def record(self) -> int:
        return max(len(self.columns), 1)

    def takes(self, file: PurePath) -> bool:
        """.csv and .tsv."""
        return file.suffix.lower() in SUFFIXES

    def fitted(self, paths: Sequence[Path]) -> Self:
        """The kind with the bins of these files; files that cannot be read, or have other columns, count for nothing.

        Bins that there are already stay, so that other files are read as those that a model has learnt.

        Raises:
            DataError: no column of theirs is a series of numbers.
        """
        if self.columns:
            return self
        header: tuple[str, ...] = ()
        numbers: list[array] = []
        rows = 0
        for path in paths:
            try:
                found, cells = _read(path)
                if header and found != header:
                    continue
            except CorruptFileError:
                continue
            if not header:
                header, numbers = found, [array("d") for _ in found]
            rows += len(cells)
            for column, values in zip(numbers, cells.T, strict=True):
                column.frombytes(values[~np.isnan(values)].tobytes())
        kept = [place for place, column in enumerate(numbers) if len(column) and len(column) >= LEAST_NUMBERS * rows]
        if header and not kept:
            raise DataError(f"none of the columns {', '.join(header)} is a series of numbers: --kind csv needs one")
        bins = [self._bins(np.frombuffer(numbers[place])) for place in kept]
        return replace(
            self,
            header=header,
            columns=tuple(header[place] for place in kept),
            edges=tuple(tuple(edges.tolist()) for edges, _ in bins),
            centres=tuple(tuple(centres.tolist()) for _, centres in bins),
        )

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """[rows * columns] tokens, the whole file.

        Raises:
            CorruptFileError: no text, a row that is longer or shorter than the others, or other columns.
        """
        header, cells = _read(path)
        if header != self.header:
            raise CorruptFileError(
                path, f"its columns are {', '.join(header)}, but those of the files before it {', '.join(self.header)}"
            )
        places = [place for place, name in enumerate(header) if name in self.columns]
        for name in header:
            if name not in self.columns:
                changes[f"files have a column that is no series of numbers and was left out: {name}"] += 1
        tokens = np.empty((len(cells), len(places)), dtype=self.dtype)
        for target, (place, edges) in enumerate(zip(places, self.edges, strict=True)):
            values = cells[:, place]
            missing = np.isnan(values)
            tokens[:, target] = np.where(missing, MISSING, np.searchsorted(edges, values, side="right") + 1)
            if missing.any():
                changes[NO_NUMBERS] += int(missing.sum())
        yield tokens.reshape(-1)

    def values(self, tokens: np.ndarray) -> np.ndarray:
        """float64[rows, columns]: the centres that int[tokens] stand for, and NaN for missing values.

        What the last row lacks is missing.

        Raises:
            DataError: a token that is not in the vocabulary.
        """
        rows = -(-len(tokens) // len(self.columns))
        padded = np.full(rows * len(self.columns), MISSING)
        padded[: len(tokens)] = self.check_tokens(tokens)
        places = padded.reshape(rows, -1)
        centres = np.concatenate([np.full((len(self.columns), 1), np.nan), np.array(self.centres)], axis=1)
        return centres[np.arange(len(self.columns)), places]

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write a CSV file of the series' columns; missing values are empty cells."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for row in self.values(tokens):
                writer.writerow(["" if math.isnan(value) else repr(float(value)) for value in row])

    def _bins(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(edges, centres) for all values of a column."""
        if self.binning == "uniform":
            ends = np.linspace(values.min(), values.max(), self.bins + 1)
            return ends[1:-1], (ends[:-1] + ends[1:]) / 2
        ordered = np.sort(values)
        # Edges are values that occur, so that a bin's values are a slice of the ordered ones.
        edges = ordered[np.arange(1, self.bins) * len(ordered) // self.bins]
        ends = np.concatenate([[0], np.searchsorted(ordered, edges, side="left"), [len(ordered)]])
        middle = (ends[:-1] + ends[1:]) // 2
        # An empty bin, which no value is put into, has its edge for a centre.
        return edges, ordered[np.minimum(middle, len(ordered) - 1)]


def _read(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """(names of the columns, float64[rows, columns] with NaN for what is no finite number)."""
    numbers = array("d")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(DELIMITERS, key=first.count)
            # strict: a quotation mark that is never closed is an error.
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            names = next((row for row in rows if row), None)
            if names is None:
                raise CorruptFileError(path, "it is empty")
            if len(names) > MOST_COLUMNS:
                raise CorruptFileError(path, f"it has {len(names):,} columns, more than {MOST_COLUMNS:,}")
            width = len(names)
            if any(cell.strip() for cell in names) and all(_is_value(cell) for cell in names):
                # Numbers already: the columns have no names.
                numbers.extend(map(_number, names))
                names = [str(place + 1) for place in range(width)]
            for row in rows:
                if row and len(row) != width:
                    raise CorruptFileError(path, f"line {rows.line_num:,} has {len(row)} cells, and not {width}")
                numbers.extend(map(_number, row))
    except UnicodeDecodeError as error:
        raise CorruptFileError(path, "it is no text in UTF-8") from error
    except csv.Error as error:
        raise CorruptFileError(path, f"it is no sound CSV ({error})") from error
    if not numbers:
        raise CorruptFileError(path, "it has no rows of values")
    if len(set(names)) < width:
        raise CorruptFileError(path, "two of its columns have the same name")
    return tuple(name.strip() for name in names), np.frombuffer(numbers).reshape(-1, width)


def _is_value(cell: str) -> bool:
    return not cell.strip() or not math.isnan(_number(cell))


def _number(cell: str) -> float:
    """The number in a cell, or NaN. Python's 1_000 is none."""
    try:
        value = float(cell) if "_" not in cell else math.nan
    except ValueError:
        return math.nan
    # Beyond that, the width of a bin would overflow.
    return value if abs(value) <= LARGEST else math.nan
