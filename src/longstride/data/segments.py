"""A text as segments that follow one another in every row of a batch, for models with a memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import Dataset

from longstride.errors import ArgumentError


class Segments(Dataset[dict[str, Any]]):
    """Batches of ``rows`` segments, each the continuation of the one in the same row of the batch before.

    The documents are cut into segments, one after another, S in all. Row r walks along them from number r * S // rows
    on, and from the first again after the last, so that S // rows batches read everything about once. Item i is that
    of row i % rows in batch i // rows and depends on i alone: a training that goes on at item i needs nothing else from
    here, but the memory as it was.

    Args:
        split: uint8 or uint16[tokens], usually a memory map.
        length: tokens in a segment.
        rows: rows of a batch.
        count: segments in the data set; a multiple of ``rows``.
        records: int64[documents + 1], where documents begin in the split, and its end: `PreparedData.records`. No
            segment reaches into another document, and each document begins anew. One document unless given.

    Each item has ``input_ids`` int64[length]; ``shift_labels`` int64[length], the token after each, which in a segment
    within a document is the first one of the next; and ``starts``, True where the row begins: a document, or the
    training. The last segment of a document is filled up with zeros, whose shift_labels are -100: they do not count,
    and nothing is ever read after them.

    Raises:
        ArgumentError: no document has two tokens; the records of another split; rows that do not divide the count.
    """

    def __init__(
        self, split: np.ndarray, length: int, *, rows: int, count: int, records: np.ndarray | None = None
    ) -> None:
        records = np.array([0, len(split)]) if records is None else records
        if records[0] != 0 or records[-1] != len(split):
            raise ArgumentError(
                f"documents from {records[0]:,} to {records[-1]:,} in a split of {len(split):,} tokens: give that "
                "split's own PreparedData.records"
            )
        if count % rows:
            raise ArgumentError(f"{count} segments in batches of {rows} rows: give a multiple of {rows}")
        self.split = split
        self.length = length
        self.rows = rows
        self.count = count
        self.records = records
        # The last token of a document predicts nothing. segments[d] is the number of the document's first segment.
        cut = -(-np.maximum(np.diff(records) - 1, 0) // length)
        self.segments = np.concatenate([[0], np.cumsum(cut)])
        if not self.total:
            raise ArgumentError(f"{len(split):,} tokens without a document of two or more: there is nothing to predict")

    @property
    def total(self) -> int:
        """Segments of the whole split."""
        return int(self.segments[-1])

    def __len__(self) -> int:
        return self.count

    def read(self, segment: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """One of the `total` segments: its tokens, those after each, int64[length] both, and if a document begins."""
        document = int(np.searchsorted(self.segments, segment, side="right")) - 1
        start = int(self.records[document]) + (segment - int(self.segments[document])) * self.length
        end = min(start + self.length, int(self.records[document + 1]) - 1)
        tokens = torch.from_numpy(self.split[start : end + 1].astype(np.int64))
        missing = self.length - (end - start)
        following = pad(tokens[1:], (0, missing), value=-100)
        return pad(tokens[:-1], (0, missing)), following, bool(start == self.records[document])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        batch, row = divmod(index, self.rows)
        tokens, following, begins = self.read((row * self.total // self.rows + batch) % self.total)
        return {"input_ids": tokens, "shift_labels": following, "starts": begins or batch == 0}

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: ``input_ids``, ``shift_labels`` and ``labels`` (the same) int64[batch, length]; ``starts``, a list.

        Starts stay on the host, which decides by them; a tensor on a device would have to be waited for.
        """
        names = ("input_ids", "shift_labels")
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in names}
        # A loss is computed where there are labels, and of these where they are shifted.
        return batch | {"labels": batch["shift_labels"], "starts": [item["starts"] for item in items]}
