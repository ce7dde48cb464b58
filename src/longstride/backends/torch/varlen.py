"""Packed documents as batches: those of one length are taken out, run together and put back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longstride.backends.documents import by_length, read_back


@dataclass(frozen=True)
class Documents:
    """All documents of one length.

    Attributes:
        length: tokens of each.
        tokens: their places in the packed tensors: a slice where they are neighbours, else int64 [documents * length].
    """

    length: int
    tokens: slice | torch.Tensor

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """[total, heads(, dim)] as [documents, heads, length(, dim)]; a view where the documents are neighbours."""
        taken = packed[self.tokens] if isinstance(self.tokens, slice) else packed.index_select(0, self.tokens)
        return taken.unflatten(0, (-1, self.length)).transpose(1, 2)

    def put(self, packed: torch.Tensor, result: torch.Tensor) -> None:
        """Write [documents, heads, length(, dim)] to its places in [total, heads(, dim)]."""
        rows = result.transpose(1, 2).flatten(0, 1)
        if isinstance(self.tokens, slice):
            packed[self.tokens] = rows
        else:
            packed.index_copy_(0, self.tokens, rows.to(packed.dtype))


def each_length(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> Iterator[Documents]:
    """The documents, grouped by length: work and memory follow the tokens, however many documents there are."""
    for length, starts in by_length(read_back(cu_seqlens, total, max_seqlen)).items():
        if starts[-1] - starts[0] == length * (len(starts) - 1):
            yield Documents(length, slice(starts[0], starts[-1] + length))
        else:
            rows = torch.tensor(starts)[:, None] + torch.arange(length)
            yield Documents(length, rows.flatten().to(cu_seqlens.device))
