"""Packed documents: where each begins and ends, read back from the device and checked."""

from __future__ import annotations

from itertools import pairwise

import torch

from longstride.errors import ArgumentError


def read_back(cu_seqlens: torch.Tensor, total: int, max_seqlen: int | None = None) -> list[int]:
    """The length of every document, on the host. On a CUDA device this waits for the device.

    Args:
        cu_seqlens: int32 or int64 [documents + 1]: document n has the tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1.
        total: tokens of all documents.
        max_seqlen: what the caller gave as the longest length; not checked when not given.

    Raises:
        ArgumentError: the offsets do not start at 0, decrease, do not end at `total`, or leave a document that is
            longer than `max_seqlen`.
    """
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ArgumentError(f"cu_seqlens[0] is {offsets[0]}: it must be 0, where the first document begins")
    lengths = [end - start for start, end in pairwise(offsets)]
    for n, length in enumerate(lengths):
        if length < 0:
            raise ArgumentError(
                f"cu_seqlens[{n + 1}] is {offsets[n + 1]}, below cu_seqlens[{n}], {offsets[n]}: it must not decrease"
            )
    if offsets[-1] != total:
        raise ArgumentError(f"cu_seqlens ends at {offsets[-1]}: it must end at {total}, the tokens of q")
    if max_seqlen is not None and (longest := max(lengths)) > max_seqlen:
        raise ArgumentError(f"max_seqlen={max_seqlen}: the longest document has {longest} tokens; give at least that")
    return lengths


def by_length(lengths: list[int]) -> dict[int, list[int]]:
    """The first tokens of the documents of each length, the shortest length first; empty documents are left out."""
    starts: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        if length:
            starts.setdefault(length, []).append(start)
        start += length
    return dict(sorted(starts.items()))
