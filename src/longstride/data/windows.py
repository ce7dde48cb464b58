"""Windows of a split as data sets for PyTorch: item i depends on i (and a seed) alone.

There is no sampler state to save: a training that goes on at window i of the sequence sees exactly the windows that
it would have seen without the interruption.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from longstride.errors import ArgumentError


class RandomWindows(Dataset[dict[str, torch.Tensor]]):
    """``count`` windows of ``length`` tokens, each starting at a position drawn uniformly by a hash of (seed, index).

    Args:
        split: uint8 or uint16[tokens], usually a memory map.
        length: tokens in a window.
        count: windows in the data set: steps times batch size.
        seed: another seed gives other windows.
        record: windows start at multiples of so many tokens, such as those of one image.

    Each item is ``{"input_ids": int64[length], "labels": int64[length]}``; the model shifts the labels itself.
    """

    def __init__(self, split: np.ndarray, length: int, count: int, seed: int, record: int = 1) -> None:
        _check_fits(split, length)
        self.split = split
        self.length = length
        self.count = count
        self.seed = seed
        self.record = record

    def __len__(self) -> int:
        return self.count

    def start(self, index: int) -> int:
        """The first token of window ``index``."""
        # Philox is a hash of (key, counter), and NumPy guarantees its raw stream from version to version.
        draw = int(np.random.Philox(key=self.seed, counter=index).random_raw())
        return draw % ((len(self.split) - self.length) // self.record + 1) * self.record

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        start = self.start(index)
        return _item(self.split[start : start + self.length])


class EvenWindows(Dataset[dict[str, torch.Tensor]]):
    """At most ``count`` windows of ``length`` tokens, spread evenly over a split: the same ones at every evaluation.

    They start at multiples of ``record`` tokens, such as those of one image. A split with room for fewer than ``count``
    windows side by side gives those.
    """

    def __init__(self, split: np.ndarray, length: int, count: int, record: int = 1) -> None:
        _check_fits(split, length)
        self.split = split
        self.length = length
        self.record = record
        # A window that is no multiple of a record reaches into one more.
        self.count = min(count, len(split) // (-(-length // record) * record))

    def __len__(self) -> int:
        return self.count

    def start(self, index: int) -> int:
        """The first token of window ``index``."""
        return index * ((len(self.split) - self.length) // self.record) // max(self.count - 1, 1) * self.record

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        start = self.start(index)
        return _item(self.split[start : start + self.length])


class PackedWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows with the boundaries of the documents in them, for packed training.

    Args:
        windows: which ones.
        records: int64[documents + 1], where documents begin in the windows' split, and its end: `PreparedData.records`.

    Each item is ``{"input_ids": int64[length], "labels": int64[length], "cu_seqlens": int32[documents + 1]}``.
    ``cu_seqlens`` is what `longstride.attention_varlen` takes: document d of the window is ``input_ids[cu_seqlens[d] :
    cu_seqlens[d + 1]]``, of which the first and the last may be parts. The label of a document's first token is -100,
    which is not counted: nothing of its own stands before it.
    """

    def __init__(self, windows: RandomWindows | EvenWindows, records: np.ndarray) -> None:
        if records[0] != 0 or records[-1] != len(windows.split):
            raise ArgumentError(
                f"documents from {records[0]:,} to {records[-1]:,} in a split of {len(windows.split):,} tokens: give "
                "that split's own PreparedData.records"
            )
        self.windows = windows
        self.records = records

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.windows[index]
        start, length = self.windows.start(index), self.windows.length
        first, last = np.searchsorted(self.records, [start, start + length], side="right")
        inside = self.records[first:last] - start
        bounds = np.unique(np.concatenate([[0], inside, [length]]))
        labels = item["labels"].clone()
        labels[torch.from_numpy(bounds[:-1])] = -100
        return {**item, "labels": labels, "cu_seqlens": torch.from_numpy(bounds.astype(np.int32))}

    @staticmethod
    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """A batch as a model takes it: the windows below one another, and where documents begin in all of them.

        Returns:
            ``input_ids`` and ``labels`` int64[batch, length], ``cu_seq_lens_q`` int32[documents + 1] of the batch's
            tokens row after row, and ``max_length_q``, the length of a window, which no document exceeds. Documents
            without tokens stand at the end, up to a power of two: compiled models then meet few numbers of them.
        """
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}
        length = batch["input_ids"].shape[1]
        begins = [item["cu_seqlens"][:-1] + row * length for row, item in enumerate(items)]
        offsets = torch.cat(begins)
        ends = (1 << (len(offsets) - 1).bit_length()) + 1 - len(offsets)
        offsets = torch.nn.functional.pad(offsets, (0, ends), value=len(items) * length)
        return batch | {"cu_seq_lens_q": offsets, "max_length_q": length}


def _check_fits(split: np.ndarray, length: int) -> None:
    if len(split) < length:
        raise ArgumentError(f"a window of {length:,} tokens does not fit into {len(split):,} tokens")


def _item(window: np.ndarray) -> dict[str, torch.Tensor]:
    input_ids = torch.from_numpy(window.astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids}
