"""How a part is cut into tiles (see `longstride.plan.shapes`) that together score each of its pairs once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch

from longstride.patterns.regions import CAUSAL, Band, BlockTable, KeyGroup, KeyList, Powers, QueryList, SameBlock, Term
from longstride.plan.parts import Part
from longstride.plan.shapes import Dense, Grid, Listed, Masked, Shifts, Tile, Window

#: Keys that the near tiles of Columns hold together, so that fewer and larger tiles cover the rest.
NEAR_KEYS = 128
#: Rows a tile of Masked tiles has where the part does not say otherwise.
ROWS = 128


@lru_cache(maxsize=512)
def tiles(part: Part, q_len: int, kv_len: int) -> tuple[Tile, ...]:
    """The tiles that together score every pair of `part`, and no pair that counts twice."""
    cut = {
        "Rows": _rows,
        "Band": _band,
        "Chunk": _chunk,
        "Offsets": _offsets,
        "Columns": _columns,
        "Table": _table,
    }[part.kind]
    with torch.device("cpu"):
        return tuple(cut(part, q_len, kv_len))


def _queries(q_len: int, kv_len: int, rows: int = ROWS) -> Grid:
    first = kv_len - q_len
    return Grid(first, -(-q_len // rows), rows, rows, low=first, high=kv_len)


def _rows(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    tokens = tuple(token for token in part.term.find(QueryList)[0].tokens if kv_len - q_len <= token < kv_len)
    rows = min(len(tokens), ROWS)
    q = Grid(0, -(-len(tokens) // rows), rows, rows, low=kv_len - q_len, high=kv_len, of=tokens)
    yield Masked(part, q, Grid(0, q.tiles, kv_len, 0, high=kv_len))


# ---- bands --------------------------------------------------------------------------------------------------------


def _band(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    band = part.term.band or Band(1, None, None)
    dilation, lo, hi = band.dilation, band.lo, band.hi
    if part.minus or part.term.regions:
        yield from _masked_band(part, band, q_len, kv_len)
        return
    if lo is None and hi is None:
        yield from _whole_classes(dilation, q_len, kv_len)
        return
    if hi is None or hi >= 0:
        yield from _backward_band(dilation, max(lo or 0, 0), hi, q_len, kv_len, flip=False)
    if lo is None or lo < 0:
        # Reversed in time, the keys ahead lie behind, and the queries are the first q_len of the positions.
        nearest = max(1, -hi) if hi is not None else 1
        farthest = None if lo is None else -lo
        yield from _backward_band(dilation, nearest, farthest, q_len, q_len, flip=True)


def _backward_band(dilation: int, lo: int, hi: int | None, q_len: int, kv_len: int, flip: bool) -> Iterator[Tile]:
    """Class distances lo .. hi back, lo >= 0: shift the keys by lo, so that the distances begin at 0."""
    before = kv_len - q_len - lo * dilation
    q_start = max(0, -before)
    q_len, before = q_len - q_start, max(0, before)
    if q_len <= 0:
        return
    most = (before + q_len - 1) // dilation
    window = most + 1 if hi is None else min(hi - lo, most) + 1
    if window > most and not flip:
        yield from _causal_classes(dilation, q_start, q_len, before)
        return
    in_class = -(-q_len // dilation)
    # Half a window a tile scores 1.5 times the window; shorter products than 32 to 64 rows are slower than that saves.
    rows = max(32, min(64, _power_of_two(window)), min(256, _power_of_two(window // 2)))
    rows = min(in_class, rows)
    yield Window(q_start, q_len, before + q_len, dilation, window, rows, flip)


def _power_of_two(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1)


def _lanes(dilation: int, q_len: int, breaks: set[int]) -> Iterator[tuple[int, int]]:
    """Runs first .. last - 1 of residue classes (by first query row) that have as many rows and keys each."""
    edges = sorted({0, min(dilation, q_len)} | {edge for edge in breaks if 0 < edge < min(dilation, q_len)})
    yield from pairwise(edges)


def _causal_classes(dilation: int, q_start: int, q_len: int, before: int) -> Iterator[Tile]:
    """Every earlier key of the query's residue class: a causal triangle a class, after a rectangle of older keys."""
    for first, last in _lanes(dilation, q_len, {q_len % dilation, dilation - before % dilation}):
        rows, older = -(-(q_len - first) // dilation), (before + first) // dilation
        key = (before + first) % dilation
        tile = Dense(last - first, rows, older + 1, q_start + first, 1, key, 1, dilation)
        if rows == 1:
            yield tile
            continue
        if older:
            yield replace(tile, k_rows=older)
        yield replace(tile, k_rows=rows, k_start=key + older * dilation, causal=True)


def _whole_classes(dilation: int, q_len: int, kv_len: int) -> Iterator[Tile]:
    """Every key of the query's residue class."""
    before = kv_len - q_len
    breaks = {q_len % dilation, dilation - before % dilation, (kv_len - before) % dilation}
    for first, last in _lanes(dilation, q_len, breaks):
        rows, key = -(-(q_len - first) // dilation), (before + first) % dilation
        yield Dense(last - first, rows, -(-(kv_len - key) // dilation), first, 1, key, 1, stride=dilation)


def _masked_band(part: Part, band: Band, q_len: int, kv_len: int) -> Iterator[Tile]:
    dilation, first = band.dilation, kv_len - q_len
    in_class = -(-q_len // dilation)
    least = max(-in_class if band.lo is None else band.lo, -in_class)
    most = min(kv_len // dilation if band.hi is None else band.hi, kv_len // dilation)
    rows = max(1, min(in_class, ROWS, max(16, _power_of_two((most - least + 1) // 2))))
    count = -(-in_class // rows)
    lanes = min(dilation, q_len)
    q = Grid(first, count, rows, rows * dilation, dilation, lanes, low=first, high=kv_len)
    start = first - most * dilation
    k = Grid(start, count, rows + most - least, rows * dilation, dilation, lanes, low=0, high=kv_len)
    if k.rows >= 2 * (kv_len // dilation + 1):  # an open band: all keys of the class serve every tile
        start = first - dilation * (first // dilation + 1)
        k = Grid(start, count, (kv_len - start) // dilation + 1, 0, dilation, lanes, low=0, high=kv_len)
    yield Masked(part, q, k)


# ---- blocks -------------------------------------------------------------------------------------------------------


def _chunk(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    block = min(region.block for region in part.term.find(SameBlock))
    first = kv_len - q_len
    low, high = first // block, -(-kv_len // block)
    if part.minus or part.term != Term.of(SameBlock(block), *([CAUSAL] if part.term.band else [])):
        q = Grid(low * block, high - low, block, block, low=first, high=kv_len)
        yield Masked(part, q, Grid(low * block, high - low, block, block, high=kv_len))
        return
    causal = part.term.band is not None
    # Whole blocks make one call; the blocks that the first query or the last key cuts are on their own.
    whole_low, whole_high = -(-first // block), kv_len // block
    runs = [(first, min(whole_low * block, kv_len), 1)] if first < whole_low * block else []
    runs += [(whole_low * block, (whole_low + 1) * block, whole_high - whole_low)] if whole_high > whole_low else []
    runs += [(whole_high * block, kv_len, 1)] if max(whole_low, whole_high) * block < kv_len else []
    for start, stop, batch in runs:
        key, rows = start // block * block, stop - start
        tile = Dense(batch, rows, min(block, kv_len - key), start - first, block, key, block)
        if not causal:
            yield tile
            continue
        if start > key:
            yield replace(tile, k_rows=start - key)
        yield replace(tile, k_rows=rows, k_start=start, causal=True)


# ---- columns ------------------------------------------------------------------------------------------------------


def _columns(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    listed = part.term.find(KeyList)
    if listed:
        keys = tuple(token for token in listed[0].tokens if token < kv_len)
        q = _queries(q_len, kv_len)
        yield Masked(part, q, Grid(0, q.tiles, len(keys), 0, high=kv_len, of=keys))
        return
    group = min(part.term.find(KeyGroup), key=lambda region: (region.stop - region.start) / region.block)
    block, count = group.block, group.stop - group.start
    farthest = [before.span.most for before in part.minus]
    if part.term != Term.of(group, CAUSAL) or None in farthest:
        q = _queries(q_len, kv_len)
        yield Masked(part, q, Grid(0, q.tiles, -(-kv_len // block) * count, 0, high=kv_len, of=group))
        return
    own_block = {Term.of(SameBlock(block), CAUSAL), Term.of(SameBlock(block))}
    nothing_near = bool(part.minus) and own_block.issuperset(part.minus)
    reach = max((before.span.most or 0 for before in part.minus), default=-1)
    # From `apart` blocks on, no earlier part has a pair and every key lies behind its query: no mask is needed there.
    apart = 1 if nothing_near else max(1, (reach + group.stop - 1) // block + 1)
    low, high = (kv_len - q_len) // block, -(-kv_len // block)
    if q_len <= block:
        q = Grid(kv_len - q_len, 1, q_len, 0, high=kv_len)
        yield Masked(part, q, Grid(0, 1, high * count, 0, high=kv_len, of=group))
        return
    # Pairs up to `near` blocks apart go into one masked tile a block, the rest into few large tiles.
    near = max(apart, min(-(-NEAR_KEYS // count), high))
    if near > 1 or not nothing_near:
        q = Grid(low * block, high - low, block, block, low=kv_len - q_len, high=kv_len)
        first = (low - near + 1) * count
        yield Masked(part, q, Grid(first, high - low, near * count, count, high=kv_len, of=group))
    yield from _staircase(group, near, q_len, kv_len)


def _staircase(group: KeyGroup, near: int, q_len: int, kv_len: int) -> Iterator[Tile]:
    """Every query block reads the groups of all blocks at least `near` before it: exact rectangles, no mask.

    Block B reads groups 0 .. n - 1 with n = B - near + 1. Where n has bit 2^l set, level l reads the 2^l groups before
    the place where n's higher bits end; so all blocks that share those bits share that rectangle.
    """
    block, count, first = group.block, group.stop - group.start, kv_len - q_len
    size = 1
    while size <= (kv_len - 1) // block - near + 1:
        runs: list[Dense] = []
        segment = 1
        while (start := (segment * size + near - 1) * block) < kv_len:
            stop = min(start + size * block, kv_len)
            if stop > first:
                rows = stop - max(start, first)
                tile = Dense(
                    batch=1,
                    q_rows=rows,
                    k_rows=size * count,
                    q_start=max(start, first) - first,
                    q_step=2 * size * block,
                    k_start=(segment - 1) * size * count,
                    k_step=2 * size * count,
                    keys=group,
                )
                last = runs[-1] if runs else None
                if last and last.q_rows == rows and last.q_start + last.batch * last.q_step == tile.q_start:
                    runs[-1] = replace(last, batch=last.batch + 1)
                else:
                    runs.append(tile)
            segment += 2
        yield from runs
        size *= 2


# ---- tables and diagonals -----------------------------------------------------------------------------------------


def _table(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    tables = part.term.find(BlockTable)
    block = tables[0].block if tables else max(16, min(64, _power_of_two(kv_len // 16)))
    pairs = tables[0].blocks(q_len, kv_len) if tables else _blocks_of_rule(part, block, q_len, kv_len)
    q_blocks, counts = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    place = torch.arange(len(pairs)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    # Query blocks with like many key blocks go together, so that padding at most doubles what is scored.
    most = 1
    while len(q_blocks) and most < 2 * int(counts.max()):
        alike = (counts <= most) & (counts > most // 2)
        if alike.any():
            width = int(counts[alike].max())
            k_blocks = torch.full((int(alike.sum()), width), -1)
            chosen = alike.repeat_interleave(counts)
            row = (alike.cumsum(0) - 1).repeat_interleave(counts)
            k_blocks[row[chosen], place[chosen]] = pairs[chosen, 1]
            yield Listed(part, block, q_blocks[alike], k_blocks, kv_len - q_len, kv_len)
        most *= 2


def _blocks_of_rule(part: Part, block: int, q_len: int, kv_len: int) -> torch.Tensor:
    """int64 [n, 2]: the blocks in which a rule of which nothing is known allows a pair, by evaluating all of it.

    It costs q_len x kv_len evaluations once a pattern and length, a slab of rows at a time.
    """
    first = (kv_len - q_len) // block
    width = -(-kv_len // block)
    j = torch.arange(kv_len)
    step = max(1, (1 << 22) // (kv_len * block))
    found = []
    for low in range(first, width, step):
        i = torch.arange(low * block, min((low + step) * block, kv_len))
        allowed = part.allows(i[:, None], j) & (i >= kv_len - q_len)[:, None]
        padded = torch.nn.functional.pad(allowed, (0, width * block - kv_len, 0, -len(i) % block))
        blocks = padded.unflatten(0, (-1, block)).unflatten(2, (width, block)).any(3).any(1).nonzero()
        blocks[:, 0] += low
        found.append(blocks)
    return torch.cat(found)


def _offsets(part: Part, q_len: int, kv_len: int) -> Iterator[Tile]:
    distances = part.term.find(Powers)[0].distances(kv_len)
    span = part.term.span.intersect(Band(1, 1 - q_len, kv_len - 1)) or Band(1, 0, 0)
    diagonal = torch.tensor(sorted({*distances, *(-distance for distance in distances)}))
    inside = span.allows(diagonal, torch.zeros_like(diagonal))
    yield Shifts(part, tuple(diagonal[inside].tolist()), q_len)
