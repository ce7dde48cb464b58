"""How a layer's cache lies in memory, and where in it each query's keys are: rows by arithmetic on positions.

All heads of a batch row share one tensor of rows. Row 0 stays zero and is read where a query has nothing to read; row 1
takes what is written and not kept. Behind them lie the stores of head 0 of the keys, then those of head 1, and so on.

A *lane* is a group of query heads that read the same rows: all query heads of a head of keys where these have one rule
(grouped-query attention), else each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from longstride.errors import ArgumentError, PatternError
from longstride.patterns.base import Pattern, whole
from longstride.plan.parts import Part, plan
from longstride.plan.reads import Read, queries_of, walk_of
from longstride.plan.storage import LONGEST, Need, Store, choose_stores, covers, need

BLANK, SPILL, SPARE_ROWS = 0, 1, 2


@dataclass(frozen=True)
class Shelf:
    """The stores of a head of keys, and the first row of each, counted from the head's first."""

    stores: tuple[Store, ...]
    offsets: tuple[int, ...]
    rows: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The stores and reads of one layer.

    Attributes:
        pattern: what is kept for.
        num_heads, num_kv_heads: of queries and of keys.
        capacity: the most positions a row of the batch may have.
        headroom: one less than how many tokens can be decoded at once, and taken back at any time.
        shelves: the different shelves.
        heads: for each head of keys, its shelf and its first row.
        routes: the different (shelf, reads).
        lanes: for each lane, its route and its head of keys. Lane l is of query heads l * share .. (l + 1) * share - 1.
        rows: rows of a batch row, all heads together.
    """

    pattern: Pattern
    num_heads: int
    num_kv_heads: int
    capacity: int
    headroom: int
    shelves: tuple[Shelf, ...]
    heads: tuple[tuple[int, int], ...]
    routes: tuple[tuple[int, tuple[Read, ...]], ...]
    lanes: tuple[tuple[int, int], ...]
    rows: int

    @property
    def share(self) -> int:
        """Query heads a lane."""
        return self.num_heads // len(self.lanes)

    @property
    def stores(self) -> tuple[Store, ...]:
        """Every store there is, of all shelves."""
        return tuple(store for shelf in self.shelves for store in shelf.stores)

    def reads(self, shortest: int, longest: int) -> int:
        """The most keys that a query at positions shortest .. longest looks at."""
        return max(sum(read.count(shortest, longest) for read in reads) for _, reads in self.routes)

    # ---- rows -----------------------------------------------------------------------------------------------------

    def write_rows(self, position: torch.Tensor, end: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        """Where new tokens are kept.

        Args:
            position: int64 [batch, tokens].
            end: int64 [batch, 1]: the position after the last new token. What it would overwrite is not written.
            there: bool [batch, tokens]: which of the tokens there are; all when not given.

        Returns:
            int64 [batch, num_kv_heads, stores, tokens]: rows of the batch row; `SPILL` where a token is not kept.
        """
        most = max(1, *(len(shelf.stores) for shelf in self.shelves))
        shelves = []
        for shelf in self.shelves:
            rows = []
            for store, offset in zip(shelf.stores, shelf.offsets, strict=True):
                kept = store.member(position)
                if position.shape[1] > 1:
                    kept = kept & store.latest(position, end)
                kept = kept if there is None else kept & there
                rows.append(torch.where(kept, store.row(position) + offset, -LONGEST))
            rows += [torch.full_like(position, -LONGEST)] * (most - len(rows))
            shelves.append(torch.stack(rows, 1))
        shelf, first = _constants(self, position.device)[:2]
        rows = torch.stack(shelves, 1).index_select(1, shelf) + first[:, None, None]
        return torch.where(rows < 0, SPILL, rows)

    def read_rows(self, position: torch.Tensor, shortest: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the keys of queries lie, once these queries' own tokens are written.

        Args:
            position: int64 [queries].
            shortest, longest: the least and the greatest position.

        Returns:
            int64 [queries, lanes, reads] rows, `BLANK` where there is nothing to read, and bool of that shape, where
            there is.
        """
        i = position[:, None]
        routes = []
        for shelf, reads in self.routes:
            rows = [i.new_empty(i.shape[0], 0)]
            for read in reads:
                n = torch.arange(read.count(shortest, longest), device=i.device)
                j = read.walk.position(i, n)
                row = (
                    self.shelves[shelf].stores[read.store].row(j.clamp(min=0)) + self.shelves[shelf].offsets[read.store]
                )
                rows.append(torch.where(read.allows(i, j), row, -LONGEST).expand(i.shape[0], n.shape[0]))
            routes.append(torch.cat(rows, 1))
        width = max(1, *(rows.shape[1] for rows in routes))
        routes = [pad(rows, (0, width - rows.shape[1]), value=-LONGEST) for rows in routes]
        route, first = _constants(self, i.device)[2:]
        rows = torch.stack(routes, 1).index_select(1, route) + first[:, None]
        there = rows >= 0
        return torch.where(there, rows, BLANK), there

    def held_rows(self, kv_len: int, length: torch.Tensor) -> torch.Tensor:
        """Where the positions 0 .. kv_len - 1 lie while rows have `length` int64 [batch] tokens.

        Returns:
            int64 [batch, num_kv_heads, kv_len]: rows; `BLANK` where a position is not held.
        """
        position = torch.arange(kv_len, device=length.device)[None]
        end = length[:, None]
        shelves = []
        for shelf in self.shelves:
            rows = torch.full((len(length), kv_len), -LONGEST, device=length.device)
            for store, offset in zip(shelf.stores, shelf.offsets, strict=True):
                held = store.member(position) & (position < end) & store.latest(position, end)
                rows = torch.where(held, store.row(position) + offset, rows)
            shelves.append(rows)
        shelf, first = _constants(self, length.device)[:2]
        rows = torch.stack(shelves, 1).index_select(1, shelf) + first[:, None]
        return torch.where(rows < 0, BLANK, rows)


@lru_cache(maxsize=256)
def _constants(layout: Layout, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Of each head of keys its shelf and first row; of each lane its route and first row."""
    shelves, firsts = zip(*layout.heads, strict=True)
    routes, heads = zip(*layout.lanes, strict=True)
    lists = (shelves, firsts, routes, [firsts[head] for head in heads])
    return tuple(torch.tensor(each, device=device) for each in lists)


@lru_cache(maxsize=256)
def layout(pattern: Pattern, capacity: int, num_heads: int, num_kv_heads: int, headroom: int = 0) -> Layout:
    """The stores and reads of one layer with `pattern`.

    Raises:
        ArgumentError: counts that do not fit together.
        PatternError: the pattern is not causal, does not split over the heads, does not cover the capacity, or looks at
            the length of the sequence.
    """
    _check(pattern, capacity, num_heads, num_kv_heads, headroom)
    group = num_heads // num_kv_heads
    with torch.device("cpu"):
        parts: dict[int, tuple[Part, ...]] = {}
        for heads, members in plan(pattern, capacity, capacity, num_heads).groups:
            parts |= dict.fromkeys(heads, members)
        shelves: dict[Shelf, int] = {}
        routes: dict[tuple[int, tuple[Read, ...]], int] = {}
        kv_heads, lanes, rows = [], [], SPARE_ROWS
        for kv_head in range(num_kv_heads):
            own = [parts[head] for head in range(kv_head * group, (kv_head + 1) * group)]
            needs = {part: need(part.term, capacity, headroom) for members in own for part in members}
            shelf = _shelf(choose_stores(dict.fromkeys(needs.values()), capacity))
            index = shelves.setdefault(shelf, len(shelves))
            kv_heads.append((index, rows))
            rows += shelf.rows
            for members in own:
                route = (index, tuple(_read(part, needs[part], shelf, capacity) for part in members))
                lanes.append((routes.setdefault(route, len(routes)), kv_head))
    packed = lanes[::group]
    if [lane for lane in packed for _ in range(group)] == lanes:
        lanes = packed
    return Layout(
        pattern,
        num_heads,
        num_kv_heads,
        capacity,
        headroom,
        tuple(shelves),
        tuple(kv_heads),
        tuple(routes),
        tuple(lanes),
        rows,
    )


def _shelf(stores: tuple[Store, ...]) -> Shelf:
    offsets, rows = [], 0
    for store in stores:
        offsets.append(rows)
        rows += store.rows
    return Shelf(stores, tuple(offsets), rows)


def _read(part: Part, wanted: Need, shelf: Shelf, capacity: int) -> Read:
    store = next(index for index, store in enumerate(shelf.stores) if covers(store, wanted, capacity))
    return Read(part, walk_of(part.term, capacity), store, queries_of(part.term))


def _check(pattern: Pattern, capacity: int, num_heads: int, num_kv_heads: int, headroom: int) -> None:
    if not isinstance(pattern, Pattern) or type(pattern).__hash__ is None:
        raise ArgumentError(f"pattern is {pattern!r}: it must be a Pattern, a fixed value")
    for name, value, least in (
        ("capacity", capacity, 1),
        ("num_heads", num_heads, 1),
        ("num_kv_heads", num_kv_heads, 1),
        ("headroom", headroom, 0),
    ):
        whole("cache", name, value, least)
    if capacity >= LONGEST:
        raise ArgumentError(f"capacity={capacity}: at most {LONGEST - 1} positions fit in 32-bit arithmetic")
    if num_heads % num_kv_heads:
        raise ArgumentError(f"{num_heads} heads must be a multiple of {num_kv_heads} kv_heads")
    if not pattern.is_causal:
        raise PatternError(
            f"{pattern}: a cache is for patterns in which no query reads a later key; intersect it with Causal(), as "
            f"in ({pattern}) & Causal()"
        )
    if pattern.bind(capacity) != pattern:
        raise PatternError(
            f"{pattern}: what this pattern allows depends on the length of the sequence, so a token's past would "
            "change as the sequence grows; make its members causal"
        )
