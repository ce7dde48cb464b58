"""A layout as numbers that the decode kernel reads: a program a launch, and lists. No Triton here.

Lanes whose routes differ in their lists alone share a launch. The program is one flat tuple of integers, a constant of
the compiled kernel; numbers that differ from lane to lane are *spots*, pairs of a place (in the lists, or a first row)
and a count, that the kernel loads. A place in the program is an index into the program itself.

| at                       | words                                                                                |
|--------------------------|--------------------------------------------------------------------------------------|
| 0, 1                     | how many stores, how many reads                                                      |
| 2 + STORE_WORDS * s      | a store: kind, spot of its first row, then by its kind                               |
| behind the stores        | the place of each read                                                               |
| a read                   | walk, then by its kind WALK_WORDS; its store's place; the spot of its queries or -1;  |
|                          | places of the conditions that the walk leaves open, of all its term's, of its drops   |
| conditions               | how many, then each one's kind and three numbers                                     |
| drops                    | how many, then the place of each one's conditions                                    |

| store  | numbers                                     | walk      | numbers                          |
|--------|---------------------------------------------|-----------|----------------------------------|
| RING   | rows (0: forgets none), block, start, width | STEPS     | dilation, lo, hi, block or 0     |
| LIST   | its spot                                    | COLUMNS   | block, start, width, least, most |
| PLACED | block, the spot of its slots                | LISTED    | its spot                         |
|        |                                             | DISTANCES | its spot                         |
|        |                                             | BLOCKS    | block, the spot of its table     |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from longstride.patterns.regions import Band, BlockTable, KeyGroup, KeyList, Powers, QueryList, Rule, SameBlock, Term
from longstride.plan import Layout
from longstride.plan.reads import Blocks, Columns, Distances, Listed, Read, Steps
from longstride.plan.storage import LONGEST, Placed, Store, count

#: Stands for "no bound" among offsets.
UNBOUNDED = LONGEST

STORE_WORDS, WALK_WORDS, CONDITION_WORDS = 6, 5, 4
RING, LIST, PLACED = range(3)
STEPS, COLUMNS, LISTED, DISTANCES, BLOCKS = range(5)
# Conditions on a pair (i, j) with their numbers: i - j >= a; i - j <= a; (i - j) % a == 0; i // a == j // a;
# b <= j % a < c; j < a; j in list; i < a; i in list; i - j in list; j // a in row i // a of a table.
LEAST, MOST, CLASS, SAME_BLOCK, KEY_GROUP, KEY_FIRST, KEY_LIST, QUERY_FIRST, QUERY_LIST, DISTANCE, TABLE = range(11)

Condition = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class DecodeLaunch:
    """One launch over some lanes.

    Attributes:
        program: as the table above says.
        lanes: int32 [lanes, 4]: lane, head of keys, its first row, whether this lane writes that head's new tokens.
        spots: int32 [lanes, spots, 2].
        span: the most keys that a query looks at, listed queries apart.
    """

    program: tuple[int, ...]
    lanes: torch.Tensor
    spots: torch.Tensor
    span: int


@dataclass(frozen=True, eq=False)
class LoweredLayout:
    """The launches of a layout, and the lists that their spots point into, int32."""

    launches: tuple[DecodeLaunch, ...]
    lists: torch.Tensor


@dataclass
class _Lists:
    """All lists, one behind the other; equal ones of one origin are there once."""

    values: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(1, dtype=torch.int32)])
    places: dict[object, tuple[int, int]] = field(default_factory=dict)

    def place(self, origin: object, values: Iterable[int] | torch.Tensor, length: int) -> tuple[int, int]:
        """(place, length), appended where it is new."""
        if origin not in self.places:
            values = values if isinstance(values, torch.Tensor) else torch.tensor(list(values), dtype=torch.int64)
            self.places[origin] = (sum(len(x) for x in self.values), length)
            self.values.append(values.flatten().to(torch.int32))
        return self.places[origin]


@dataclass
class _Program:
    """The program and the spots of one route."""

    layout: Layout
    lists: _Lists
    words: list[int] = field(default_factory=list)
    spots: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # never empty

    def put(self, words: Sequence[int]) -> int:
        self.words += words
        return len(self.words) - len(words)

    def spot(self, origin: object, values: Iterable[int] | torch.Tensor, length: int) -> int:
        self.spots.append(self.lists.place(origin, values, length))
        return len(self.spots) - 1

    # ---- stores ---------------------------------------------------------------------------------------------------

    def store(self, store: Store, offset: int) -> list[int]:
        self.spots.append((offset, store.rows))
        first, keys = len(self.spots) - 1, store.keys
        if isinstance(keys, Placed):
            words = [PLACED, first, keys.block, self.spot(keys, keys.slot, len(keys.slot))]
        elif isinstance(keys, KeyList):
            words = [LIST, first, self.spot(keys, keys.tokens, len(keys.tokens))]
        else:
            forgets = count(keys, self.layout.capacity) > store.rows
            words = [RING, first, store.rows if forgets else 0, keys.block, keys.start, keys.stop - keys.start]
        return words + [0] * (STORE_WORDS - len(words))

    # ---- reads ----------------------------------------------------------------------------------------------------

    def read(self, read: Read) -> int:
        walk = self.walk(read)
        queries = self.spot(read.queries, read.queries, len(read.queries)) if read.queries else -1
        drops = [self.conditions(term) for term in read.dropped]
        keep, full = self.conditions(read.open), self.conditions(read.part.term)
        dropped = self.put([len(drops), *drops])
        return self.put([*walk, 2 + STORE_WORDS * read.store, queries, keep, full, dropped])

    def walk(self, read: Read) -> list[int]:
        match read.walk:
            case Steps(dilation, lo, hi, block):
                words = [STEPS, dilation, lo, UNBOUNDED if hi is None else min(hi, UNBOUNDED), block or 0]
            case Columns(group, least, most):
                words = [COLUMNS, group.block, group.start, group.stop - group.start, least]
                words.append(UNBOUNDED if most is None else min(most, UNBOUNDED))
            case Listed(tokens):
                words = [LISTED, self.spot(tokens, tokens, len(tokens))]
            case Distances(distances):
                words = [DISTANCES, self.spot(distances, distances, len(distances))]
            case Blocks(table, _):
                words = [BLOCKS, table.block, self.table(table)]
        return words + [0] * (1 + WALK_WORDS - len(words))

    def table(self, table: BlockTable) -> int:
        """The spot of the lists of a table's blocks; its count is the width of a row."""
        blocks = Blocks(table, self.layout.capacity).blocks(torch.device("cpu"))
        return self.spot(("table", table), blocks, blocks.shape[1])

    # ---- conditions -----------------------------------------------------------------------------------------------

    def conditions(self, term: Term) -> int:
        found = [*_of_band(term.band), *(self.condition(region) for region in term.regions)]
        return self.put([len(found), *(word for condition in found for word in condition)])

    def condition(self, region: object) -> Condition:
        match region:
            case SameBlock(block):
                return SAME_BLOCK, block, 0, 0
            case KeyGroup(block, start, stop):
                return KEY_GROUP, block, start, stop
            case KeyList(tokens):
                return self.listed(tokens, KEY_FIRST, KEY_LIST)
            case QueryList(tokens):
                return self.listed(tokens, QUERY_FIRST, QUERY_LIST)
            case Powers():
                distances = region.distances(self.layout.capacity)
                return DISTANCE, self.spot(distances, distances, len(distances)), 0, 0
            case BlockTable():
                return TABLE, region.block, self.table(region), 0
            case _:
                raise AssertionError(f"{region} is an obstacle")

    def listed(self, tokens: tuple[int, ...], first: int, any_: int) -> Condition:
        if tokens == tuple(range(len(tokens))):
            return first, len(tokens), 0, 0
        return any_, self.spot(tokens, tokens, len(tokens)), 0, 0


def _of_band(band: Band | None) -> list[Condition]:
    if band is None:
        return []
    found: list[Condition] = []
    if band.dilation > 1:
        found.append((CLASS, band.dilation, 0, 0))
    if band.least is not None and band.least > 0:  # no key after the query is ever looked at
        found.append((LEAST, min(band.least, UNBOUNDED), 0, 0))
    if band.most is not None:
        found.append((MOST, max(-1, min(band.most, UNBOUNDED)), 0, 0))
    return found


def decode_obstacles(layout: Layout) -> list[str]:
    """What in a layout the kernel cannot do; [] when it can do all of it."""
    found: dict[str, None] = {}
    for _, reads in layout.routes:
        for part in (read.part for read in reads):
            for term in (part.term, *part.minus):
                for rule in term.find(Rule):
                    found[f"the rule of {rule.pattern} is the user's own Python code, which no kernel can call"] = None
                if term.band is not None and term.band.dilation >= LONGEST:
                    found[f"{part} steps too far for 32-bit positions"] = None
    return list(found)


@lru_cache(maxsize=256)
def lower_layout(layout: Layout, device: torch.device) -> LoweredLayout:
    """The launches of a layout without obstacles, their tensors on the device."""
    lists = _Lists()
    routes = [_route(layout, route, lists) for route in range(len(layout.routes))]
    together: dict[tuple[int, ...], list[int]] = {}
    for lane, (route, _) in enumerate(layout.lanes):
        together.setdefault(tuple(routes[route].words), []).append(lane)
    launches, written = [], set()
    for program, members in together.items():
        lanes, spots = [], []
        for lane in members:
            route, kv_head = layout.lanes[lane]
            lanes.append([lane, kv_head, layout.heads[kv_head][1], int(kv_head not in written)])
            spots.append(routes[route].spots)
            written.add(kv_head)
        span = max(_span(layout, layout.lanes[lane][0]) for lane in members)
        launches.append(
            DecodeLaunch(
                program,
                torch.tensor(lanes, dtype=torch.int32, device=device),
                torch.tensor(spots, dtype=torch.int32, device=device).view(len(members), -1, 2),
                span,
            )
        )
    return LoweredLayout(tuple(launches), torch.cat(lists.values).to(device))


def _route(layout: Layout, index: int, lists: _Lists) -> _Program:
    shelf, reads = layout.routes[index]
    made, stores = _Program(layout, lists), layout.shelves[shelf]
    made.put([len(stores.stores), len(reads)])
    for store, offset in zip(stores.stores, stores.offsets, strict=True):
        made.put(made.store(store, offset))
    places = made.put([0] * len(reads))
    for number, read in enumerate(reads):
        made.words[places + number] = made.read(read)
    return made


def _span(layout: Layout, route: int) -> int:
    return sum(read.walk.count(layout.capacity - 1) for read in layout.routes[route][1] if not read.queries)
