"""What a kind of data is: how its files become tokens, and tokens files again.

A kind is a frozen value, so its name and settings say all about the tokens of a file: they go into the key of the
cache and into the run's own copy. One file holds one or more *records* (an image, a recording, a piece, a document):
what a reader would call one example.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np

from longstride.errors import DataError

# The folders that name a split, as data sets are usually laid out.
NAMED_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class CorruptFileError(DataError):
    """One file is not what its kind reads.

    Args:
        path: the file.
        what: what is wrong with it, such as ``"it ends too early"``.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


class Kind(ABC):
    """How files of one kind become tokens. Concrete kinds are frozen dataclasses; their fields are their settings."""

    # What --kind calls it, what one token is, and what a sample's file name ends in.
    name: ClassVar[str]
    unit: ClassVar[str]
    sample_suffix: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:
        """The kind for windows of ``context`` tokens, with those of ``settings`` that it has.

        Raises:
            DataError: it cannot work with a value.
        """

    @classmethod
    def surely(cls, file: PurePath) -> bool:  # noqa: ARG003 (kinds with suffixes of their own need it)
        """Whether a file's name says that it is of this kind and no other; never for kinds that must be asked for."""
        return False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens are 0 to vocab_size - 1."""

    @property
    def dtype(self) -> np.dtype:
        """The narrowest type for the tokens: uint8 or uint16, little-endian."""
        return np.dtype("u1" if self.vocab_size <= 256 else "<u2")

    @property
    def record(self) -> int:
        """Windows, and splits, begin at multiples of so many tokens; 1 where they may begin anywhere."""
        return 1

    def axes(self, context: int) -> list[int] | None:  # noqa: ARG002 (kinds with axes need it)
        """The model's position axes for windows of ``context`` tokens, slowest first; None to leave them to it."""
        return None

    @abstractmethod
    def takes(self, file: PurePath) -> bool:
        """Whether a file of a folder, by its name, is one to read."""

    @abstractmethod
    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """The records of one file: arrays of `dtype`, one dimension each, none of them empty.

        Args:
            changes: counts what had to be changed or left out, by what a reader of the screen should be told, such as
                ``"images were cropped and scaled"``.

        Raises:
            CorruptFileError: the file is not what it should be.
        """

    @abstractmethod
    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write tokens, int[any], as a file that people open: the way back.

        Raises:
            DataError: a token that the kind does not have.
        """

    def fitted(self, paths: Sequence[Path]) -> Self:  # noqa: ARG002
        """The kind with all that it must learn from the files before it can decode one; corrupt files teach nothing."""
        return self

    def named_split(self, file: PurePath) -> str | None:
        """The split that a file's place names, such as ``test/0.png``, or None."""
        return NAMED_FOLDERS.get(file.parts[0].lower()) if len(file.parts) > 1 else None

    def settings(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return dataclasses.asdict(self)  # ty: ignore[invalid-argument-type]

    def check_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """``tokens`` as they are, if all are in the vocabulary.

        Raises:
            DataError: one is not.
        """
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(wrong):
            raise DataError(
                f"token {wrong[0]} is not one of the {self.vocab_size} of --kind {self.name}: give 0 to "
                f"{self.vocab_size - 1}"
            )
        return tokens
