"""Exact pair counts in closed form, by inclusion and exclusion over the terms of a pattern.

No mask is built: a term costs at most one vector over its keys (2^20 positions: milliseconds). Only a user's own rule,
of which nothing is known, is counted by evaluating it, a slab of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from longstride.patterns.regions import (
    Band,
    BlockTable,
    KeyGroup,
    KeyList,
    Powers,
    QueryList,
    Rule,
    SameBlock,
    Term,
    without_contained,
)

#: Pairs evaluated at once where a rule has to be evaluated: 2^22 bools.
SLAB = 1 << 22


def count_union(terms: Sequence[Term], q_len: int, kv_len: int, start: Term | None = None) -> int:
    """Pairs in at least one of `terms` (and in `start`, where given): |A or B| = |A| + |B| - |A and B| ..."""
    total, terms = 0, without_contained(terms)
    for index, term in enumerate(terms):
        joined = term if start is None else start.intersect(term)
        if joined is None:
            continue
        total += count_term(joined, q_len, kv_len) - count_union(terms[index + 1 :], q_len, kv_len, joined)
    return total


def count_without(term: Term, minus: Iterable[Term], q_len: int, kv_len: int) -> int:
    """Pairs of `term` that none of `minus` has."""
    return count_term(term, q_len, kv_len) - count_union(list(minus), q_len, kv_len, term)


def count_term(term: Term, q_len: int, kv_len: int) -> int:
    """Pairs of one term with queries kv_len - q_len .. kv_len - 1 and keys 0 .. kv_len - 1."""
    if term.find(Rule):
        return _count_rule(term, q_len, kv_len)
    if tables := term.find(BlockTable):
        return _count_table(tables[0], term, q_len, kv_len)
    if powers := term.find(Powers):
        return _count_powers(powers[0], term, q_len, kv_len)
    if term.find(QueryList):
        return _count_rows(term, q_len, kv_len)
    keys = [region for region in term.regions if isinstance(region, KeyGroup | KeyList)]
    if keys:
        return _count_by_key(term, _positions(keys, kv_len), kv_len - q_len, kv_len)
    if term.find(SameBlock):
        return _count_same_block(term, q_len, kv_len)
    return _count_band(term.band, q_len, kv_len)


def _count_band(band: Band | None, q_len: int, kv_len: int) -> int:
    """Sum over the diagonals of a band of the pairs on each; the whole rectangle without a band.

    The diagonal of offset d has q_len + d pairs below zero, q_len from 0 to kv_len - q_len, and kv_len - d above:
    three arithmetic series.
    """
    if band is None:
        return q_len * kv_len
    first_query = kv_len - q_len
    total = 0
    for low, high, at_zero, slope in (
        (1 - q_len, -1, q_len, 1),
        (0, first_query, q_len, 0),
        (first_query + 1, kv_len - 1, kv_len, -1),
    ):
        inside = band.intersect(Band(1, low, high)) if low <= high else None
        if inside is not None:
            assert inside.lo is not None
            assert inside.hi is not None
            count, ends = inside.hi - inside.lo + 1, (inside.lo + inside.hi) * inside.dilation
            total += count * (2 * at_zero + slope * ends) // 2
    return total


def _count_by_key(term: Term, keys: torch.Tensor, first_query: int, kv_len: int) -> int:
    """Sum over `keys` of how many queries of a band and of blocks read each: an arithmetic progression of queries."""
    first, last = torch.full_like(keys, first_query), torch.full_like(keys, kv_len - 1)
    for region in term.find(SameBlock):
        start = keys // region.block * region.block
        first, last = torch.maximum(first, start), torch.minimum(last, start + region.block - 1)
    return int(_progression(term.band, first - keys, last - keys).sum())


def _progression(band: Band | None, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """How many offsets of `band` lie in least .. most, elementwise."""
    if band is None:
        return (most - least + 1).clamp(min=0)
    lo, hi = -(-least // band.dilation), most // band.dilation
    lo = lo if band.lo is None else lo.clamp(min=band.lo)
    hi = hi if band.hi is None else hi.clamp(max=band.hi)
    return (hi - lo + 1).clamp(min=0)


def _count_same_block(term: Term, q_len: int, kv_len: int) -> int:
    blocks = [region.block for region in term.find(SameBlock)]
    first = kv_len - q_len
    if len(blocks) > 1:
        return _count_by_key(term, torch.arange(kv_len), first, kv_len)
    block = blocks[0]
    # Whole blocks are alike: count one and multiply; only the two ragged ends are counted on their own.
    low, high = -(-first // block), kv_len // block
    if high <= low:
        return _count_by_key(term, torch.arange(first // block * block, kv_len), first, kv_len)
    whole = (high - low) * _count_by_key(term, torch.arange(block), 0, block)
    head = _count_by_key(term, torch.arange(first // block * block, low * block), first, low * block)
    tail = _count_by_key(term, torch.arange(high * block, kv_len), high * block, kv_len)
    return whole + head + tail


def _count_rows(term: Term, q_len: int, kv_len: int) -> int:
    """Global queries: few rows, so sum over them; with a set of keys besides, look at that small grid."""
    tokens = [token for token in term.find(QueryList)[0].tokens if kv_len - q_len <= token < kv_len]
    rows = torch.tensor(tokens, dtype=torch.int64)
    keys = [region for region in term.regions if isinstance(region, KeyGroup | KeyList)]
    first, last = torch.zeros_like(rows), torch.full_like(rows, kv_len - 1)
    for region in term.find(SameBlock):
        start = rows // region.block * region.block
        first, last = torch.maximum(first, start), torch.minimum(last, start + region.block - 1)
    if not keys:
        return int(_progression(term.band, rows - last, rows - first).sum())
    positions = _positions(keys, kv_len)
    if term.band is not None and term.band.dilation > 1:
        return _count_grid(term, rows, positions)
    if term.band is not None and term.band.most is not None:
        first = torch.maximum(first, rows - term.band.most)
    if term.band is not None and term.band.least is not None:
        last = torch.minimum(last, rows - term.band.least)
    # The keys are sorted: those within first .. last are found by two searches.
    found = torch.searchsorted(positions, last + 1) - torch.searchsorted(positions, first)
    return int(found.clamp(min=0).sum())


def _positions(keys: list, kv_len: int) -> torch.Tensor:
    """The key positions, ascending, that are in all of these key groups and lists."""
    first, *others = sorted(keys, key=lambda region: isinstance(region, KeyGroup))
    positions = first.positions(kv_len)
    for region in others:
        positions = positions[region.allows(positions, positions)]
    return positions


def _count_powers(powers: Powers, term: Term, q_len: int, kv_len: int) -> int:
    """The diagonals one by one: there are about 2 log(length)."""
    others = Term(term.band, tuple(region for region in term.regions if region != powers))
    offsets = {sign * distance for distance in powers.distances(kv_len) for sign in (1, -1)}
    total = 0
    for offset in sorted(offsets):
        diagonal = Band(abs(offset), offset // abs(offset), offset // abs(offset)) if offset else Band(1, 0, 0)
        joined = others.intersect(Term(diagonal))
        total += 0 if joined is None else count_term(joined, q_len, kv_len)
    return total


def _count_table(table: BlockTable, term: Term, q_len: int, kv_len: int) -> int:
    """Whole blocks by arithmetic on how far apart they are; cut blocks, and those with further rules, by looking."""
    pairs, block = table.blocks(q_len, kv_len), table.block
    for column, kind in ((0, QueryList), (1, KeyList)):
        for region in term.find(kind):
            pairs = pairs[torch.isin(pairs[:, column], torch.tensor(region.tokens) // block)]
    others = [region for region in term.regions if region != table]
    first = kv_len - q_len
    whole = (pairs[:, 0] * block >= first) & ((pairs + 1).amax(1) * block <= kv_len)
    total = 0
    if others:
        pairs, total = _settle_blocks(pairs[whole], pairs[~whole], term, others, block)
        whole = torch.zeros(len(pairs), dtype=torch.bool)
    apart, times = torch.unique((pairs[whole, 0] - pairs[whole, 1]) * block, return_counts=True)
    total += int((_block_pairs_in_band(apart, term.band, block) * times).sum())
    place = torch.arange(block)
    step = max(1, SLAB // (block * block))
    for slab in pairs[~whole].split(step):
        i = (slab[:, :1] * block + place)[:, :, None]
        j = (slab[:, 1:] * block + place)[:, None, :]
        inside = (i >= first) & (i < kv_len) & (j < kv_len)
        total += int((term.allows(i.clamp(max=kv_len - 1), j.clamp(max=kv_len - 1)) & inside).sum())
    return total


def _settle_blocks(
    whole: torch.Tensor, cut: torch.Tensor, term: Term, others: list, block: int
) -> tuple[torch.Tensor, int]:
    """(block pairs that have to be looked at, pairs in the others).

    Where a whole block pair lies inside the band, and in one block of every `SameBlock` or in none, what is left are
    rules on keys or on queries alone: so many queries times so many keys.
    """
    query, key = whole[:, 0] * block, whole[:, 1] * block
    least, most = query - key - (block - 1), query - key + (block - 1)
    band = term.band or Band(1, None, None)
    inside = torch.full_like(query, band.dilation == 1, dtype=torch.bool)
    outside = torch.zeros_like(inside)
    if band.least is not None:
        inside, outside = inside & (least >= band.least), outside | (most < band.least)
    if band.most is not None:
        inside, outside = inside & (most <= band.most), outside | (least > band.most)
    queries, keys = torch.full_like(query, block), torch.full_like(query, block)
    for region in others:
        if isinstance(region, SameBlock):
            size = region.block
            one = (torch.minimum(query, key) // size) == ((torch.maximum(query, key) + block - 1) // size)
            apart = ((query + block - 1) // size < key // size) | ((key + block - 1) // size < query // size)
            inside, outside = inside & one, outside | apart
        elif isinstance(region, KeyGroup | KeyList) and len(others) == len(term.find(SameBlock)) + 1:
            keys = region.count_before(key + block) - region.count_before(key)
        else:
            inside = torch.zeros_like(inside)
    settled = int((queries * keys)[inside & ~outside].sum())
    return torch.cat([whole[~inside & ~outside], cut]), settled


def _block_pairs_in_band(apart: torch.Tensor, band: Band | None, block: int) -> torch.Tensor:
    """Pairs of a band in a whole block x block tile whose corner has offset `apart`, elementwise."""
    if band is None:
        return torch.full_like(apart, block * block)
    # An offset d from the corner's diagonal has block - |d| pairs; the band takes every dilation-th offset.
    near = torch.arange(-block + 1, block)
    offset = apart[:, None] + near
    taken = band.allows(offset, torch.zeros_like(offset))
    return (taken * (block - near.abs())).sum(1)


def _count_rule(term: Term, q_len: int, kv_len: int) -> int:
    return _count_grid(term, torch.arange(kv_len - q_len, kv_len), torch.arange(kv_len))


def _count_grid(term: Term, rows: torch.Tensor, keys: torch.Tensor) -> int:
    step = max(1, SLAB // max(1, len(keys)))
    return sum(int(term.allows(slab[:, None], keys).sum()) for slab in rows.split(step)) if len(rows) else 0
