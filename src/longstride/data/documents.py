"""Text, code and logs as bytes, with the boundaries of the documents kept.

A token is a byte, as for plain bytes, and documents are joined without anything in between. But each is a record, so
`PreparedData.records` are the ``cu_seqlens`` of packed training, and `PackedWindows` cuts windows that carry them: with
`longstride.attention_varlen` no document then sees another.

A file is a document; of a ``.jsonl`` file, the field ``text`` of each line is. Empty ones are left out.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, Self

import numpy as np

from longstride.data.kind import CorruptFileError, Kind

EMPTY = "documents were empty, and were left out"


@dataclass(frozen=True)
class Documents(Kind):
    """Documents as bytes. It has no settings."""

    name: ClassVar[str] = "documents"
    unit: ClassVar[str] = "byte"
    sample_suffix: ClassVar[str] = ".txt"

    @classmethod
    def from_settings(cls, context: int, settings: Mapping[str, Any]) -> Self:  # noqa: ARG003 (it has none)
        """The one there is."""
        return cls()

    @property
    def vocab_size(self) -> int:
        return 256

    def takes(self, file: PurePath) -> bool:  # noqa: ARG002 (a Kind has it)
        """Every file."""
        return True

    def decode(self, path: Path, changes: Counter[str]) -> Iterator[np.ndarray]:
        """uint8[bytes] for each document.

        Raises:
            CorruptFileError: a line of a .jsonl file that is not an object with a text.
        """
        documents = _lines(path) if path.suffix.lower() == ".jsonl" else iter([path.read_bytes()])
        for document in documents:
            if document:
                yield np.frombuffer(document, dtype=np.uint8)
            else:
                changes[EMPTY] += 1

    def write(self, tokens: np.ndarray, path: Path) -> None:
        """Write the bytes as they are."""
        path.write_bytes(self.check_tokens(tokens).astype(np.uint8).tobytes())


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                yield text.encode()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise CorruptFileError(path, f"line {number:,} is no JSON object with a field text of text") from error
