"""What a tile meets, in numbers: the sources of launches and the conditions on their pairs. No Triton here.

| owner  | its tiles                                                                      | numbers             |
|--------|--------------------------------------------------------------------------------|---------------------|
| LANES  | consecutive rows of a residue class mod step; `pack` neighbouring classes a tile | step                |
| BLOCKS | consecutive positions that never cross the edge of a block                      | block               |
| GROUP  | keys start .. start + count - 1 of every block, compacted                       | block, start, count |
| LIST   | listed positions                                                               | (spot) place, count |

| source  | what the tile meets                                    | numbers                                        |
|---------|--------------------------------------------------------|------------------------------------------------|
| RANGE   | class distances lo .. hi, without a mask from `clear`  | lo, hi, clear                                  |
| CHUNK   | the same within its block                              | lo, hi, clear, block                           |
| COLUMNS | the keys of a group, compacted                         | lo, hi, clear, block, start, count             |
| LISTED  | listed positions                                       | (spot) place, count                            |
| TABLE   | listed blocks                                          | block, its spot: row starts, row starts a head |
| DIAGONALS | single distances                                     | (spot) place, count                            |

Lists of all kinds lie in one int32 tensor; a `place` is an index into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from longstride.patterns.regions import (
    Band,
    BlockTable,
    KeyGroup,
    KeyList,
    Powers,
    QueryList,
    SameBlock,
    Term,
)
from longstride.plan import Part, Plan

#: Longest supported kv_len; also stands for "no bound" in numbers, so that sums of two fit in 32 bits.
UNBOUNDED = 1 << 30

# Owners.
LANES, BLOCKS, GROUP, LIST = range(4)
# Sources.
RANGE, CHUNK, COLUMNS, LISTED, TABLE, DIAGONALS = range(6)
# Conditions on a pair (i, j), with their numbers: i - j >= a; i - j <= a; (i - j) % a == 0; i // a == j // a;
# start <= j % block < stop; j < a; j in list; i < a; i in list; abs(i - j) in list.
LEAST, MOST, CLASS, SAME_BLOCK, KEY_GROUP, KEY_FIRST, KEY_LIST, QUERY_FIRST, QUERY_LIST, DISTANCE = range(10)
#: As CLASS, for the classes that the tiles go along: it needs a look only where a tile packs several classes.
OWN_CLASS = 10

Condition = tuple[int, int]  # kind, index of its first number


@dataclass(frozen=True)
class Source:
    """One stretch of the other side.

    Attributes:
        kind: RANGE .. DIAGONALS; index: of its first number.
        split: its pairs between `clear` and `hi` need no mask: run these without.
        keep: conditions that every pair must meet, as far as the stretch does not say so itself.
        drop: terms (conjunctions of conditions) of earlier parts; a pair that meets one is left out.
    """

    kind: int
    index: int
    split: bool
    keep: tuple[Condition, ...]
    drop: tuple[tuple[Condition, ...], ...]

    def __str__(self) -> str:
        """What a kernel takes as a compile-time constant: kind/index/split/keep/drop, conditions as kind.index."""
        keep, *drop = (",".join(f"{kind}.{index}" for kind, index in term) for term in (self.keep, *self.drop))
        return f"{self.kind}/{self.index}/{int(self.split)}/{keep}/{'|'.join(drop)}"


class Writer:
    """Collects numbers and lists."""

    def __init__(self, lists: list[torch.Tensor]) -> None:
        self.numbers: list[int] = []
        self.spots: list[int] = []
        self.lists = lists

    def put(self, *numbers: int) -> int:
        """Append, and return the index of the first. Equal runs are not shared: they are few."""
        self.numbers += numbers
        return len(self.numbers) - len(numbers)

    def put_spot(self, place: int, more: int) -> int:
        """Append a place in the lists and a count (or row length), and return the index of the first."""
        self.spots += (place, more)
        return len(self.spots) - 2

    def put_list(self, values: torch.Tensor | Iterable[int]) -> int:
        """Append to the lists, and return the place."""
        values = values if isinstance(values, torch.Tensor) else torch.tensor(list(values), dtype=torch.int64)
        place = sum(len(x) for x in self.lists)
        self.lists.append(values.to(torch.int32))
        return place


Owner = tuple[int, int, tuple[int, ...] | KeyGroup]  # kind, step or block, listed positions or group


def steps(band: Band, plan: Plan) -> int:
    """The band's dilation; any that passes the length leaves the same pairs, those of a position with itself."""
    return min(band.dilation, plan.kv_len)


def sparsest_group(part: Part) -> KeyGroup:
    """The sparsest group of a Columns part."""
    return min(part.term.find(KeyGroup), key=lambda region: (region.stop - region.start) / region.block)


def source_of(
    plan: Plan, part: Part, owner: Owner, of_heads: list[Part], queries_own: bool, out: Writer
) -> tuple[Source, int]:
    """The source of one part, and about how many positions a tile finds there."""
    kind, step, _ = owner
    term = part.term
    band = term.band or Band(1, None, None)
    unit = step if kind == LANES and part.kind == "Band" else 1
    dilation = steps(band, plan)
    keep = list(_conditions(Term(term.band), out)) if term.band else []
    if unit > 1:
        keep = [(OWN_CLASS if name == CLASS else name, index) for name, index in keep]
    drop = [tuple(_conditions(before, out)) for before in part.minus if not before.find(BlockTable)]
    if part.skip_rows:
        drop.append((_listed(part.skip_rows, QUERY_FIRST, QUERY_LIST, out),))
    # What the owner or the source itself already sees to needs no condition.
    said: list = list(term.find(QueryList)) if part.kind == "Rows" else []
    if part.kind == "Columns":
        said = term.find(KeyList) or [sparsest_group(part)]
    if part.kind == "Offsets":
        said = term.find(Powers)[:1]
    if part.kind == "Table":
        said = list(term.find(BlockTable))
    if part.kind == "Chunk":
        said = [min(term.find(SameBlock), key=lambda region: region.block)]
    rest = [region for region in term.regions if region not in said]
    more = [condition for region in rest for condition in _conditions(Term(None, (region,)), out)]
    regular = not more and not part.skip_rows
    if part.kind == "Chunk":
        keep += _conditions(Term(None, tuple(said)), out)

    # Bounds of i - j in steps, and from where on no earlier part has a pair.
    lo, hi = (band.lo, band.hi) if unit > 1 else (band.least, band.most)
    lo = -UNBOUNDED if lo is None else min(max(lo, -UNBOUNDED), UNBOUNDED)
    hi = UNBOUNDED if hi is None else min(max(hi, -UNBOUNDED), UNBOUNDED)
    clear = lo
    for before in part.minus:
        most = before.span.most
        clear = UNBOUNDED if most is None else max(clear, most // unit + 1)
    split = regular and clear < UNBOUNDED and dilation == unit
    bounds = (lo, hi, clear)
    keep_all = (*keep, *more)
    width = max(1, min(hi - lo + 1, plan.kv_len // unit if band.lo is None else plan.kv_len // unit // 2))

    match part.kind:
        case "Chunk":
            block = min(said[0].block, UNBOUNDED)
            return Source(CHUNK, out.put(*bounds, block), split, keep_all, tuple(drop)), block
        case "Table":
            place, starts = _table(plan, of_heads, queries_own, out)
            block = said[0].block
            return Source(TABLE, out.put(block, out.put_spot(place, starts)), False, keep_all, tuple(drop)), 4 * block
        case "Offsets":
            distances = term.find(Powers)[0].distances(plan.kv_len)
            span = term.span.intersect(Band(1, 1 - plan.q_len, plan.kv_len - 1)) or Band(1, 0, 0)
            signed = torch.tensor(sorted({*distances, *(-distance for distance in distances)}))
            inside = signed[span.allows(signed, torch.zeros_like(signed))]
            index = out.put_spot(out.put_list(inside), len(inside))
            return Source(DIAGONALS, index, False, keep_all, tuple(drop)), len(inside)
        case "Rows" if not queries_own:
            tokens = [t for t in said[0].tokens if plan.kv_len - plan.q_len <= t < plan.kv_len]
            index = out.put_spot(out.put_list(tokens), len(tokens))
            return Source(LISTED, index, False, keep_all, tuple(drop)), len(tokens)
        case "Columns" if queries_own:
            if isinstance(said[0], KeyList):
                tokens = tuple(t for t in said[0].tokens if t < plan.kv_len)
                if tokens == tuple(range(len(tokens))):  # the first n keys: a group of one large block
                    index = out.put(*bounds, UNBOUNDED, 0, len(tokens))
                    return Source(COLUMNS, index, split, keep_all, tuple(drop)), len(tokens)
                index = out.put_spot(out.put_list(tokens), len(tokens))
                return Source(LISTED, index, False, keep_all, tuple(drop)), len(tokens)
            group = said[0]
            index = out.put(*bounds, group.block, group.start, group.stop - group.start)
            width = width * (group.stop - group.start) // group.block
            return Source(COLUMNS, index, split, keep_all, tuple(drop)), width
    return Source(RANGE, out.put(*bounds), split, keep_all, tuple(drop)), width


def _table(plan: Plan, of_heads: list[Part], queries_own: bool, out: Writer) -> tuple[int, int]:
    """Write the row starts of every head, [heads, blocks + 1], then the blocks; (place, row starts a head).

    for head: for row: for n in range(starts[head][row], starts[head][row + 1]): block = lists[n]
    """
    of_heads = of_heads[:1] if len(set(of_heads)) == 1 else of_heads
    block = of_heads[0].term.find(BlockTable)[0].block
    count = -(-plan.kv_len // block)
    counts, entries = [], []
    for part in of_heads:
        pairs = part.term.find(BlockTable)[0].blocks(plan.q_len, plan.kv_len)
        laid = [table.blocks(plan.q_len, plan.kv_len) for before in part.minus for table in before.find(BlockTable)]
        code = pairs[:, 0] * count + pairs[:, 1]
        for other in laid:
            code = code[~torch.isin(code, other[:, 0] * count + other[:, 1])]
        row, column = (code // count, code % count) if queries_own else (code % count, code // count)
        order = torch.argsort(row * count + column)
        counts.append(torch.bincount(row, minlength=count)[:count])
        entries.append(column[order])
    place = sum(len(x) for x in out.lists)
    size = len(of_heads) * (count + 1)
    starts, offset = [], place + size
    for found in counts:
        starts.append(torch.cat([torch.zeros(1, dtype=torch.int64), found.cumsum(0)]) + offset)
        offset += int(found.sum())
    out.put_list(torch.cat(starts))
    out.put_list(torch.cat(entries))
    return place, count + 1 if len(of_heads) > 1 else 0


def _listed(tokens: tuple[int, ...], first: int, listed: int, out: Writer) -> Condition:
    """Membership in a list: one comparison where it is the first n positions."""
    if tokens == tuple(range(len(tokens))):
        return first, out.put(len(tokens))
    return listed, out.put_spot(out.put_list(tokens), len(tokens))


def _conditions(term: Term, out: Writer) -> Iterable[Condition]:
    """The conditions of a term, their numbers written."""
    band = term.band
    if band is not None:
        if band.least is not None and band.least > -UNBOUNDED:
            yield LEAST, out.put(min(band.least, UNBOUNDED))
        if band.most is not None and band.most < UNBOUNDED:
            yield MOST, out.put(max(band.most, -UNBOUNDED))
        if band.dilation > 1:
            yield CLASS, out.put(min(band.dilation, UNBOUNDED))
    for region in term.regions:
        match region:
            case SameBlock(block):
                yield SAME_BLOCK, out.put(min(block, UNBOUNDED))
            case KeyGroup(block, start, stop):
                yield KEY_GROUP, out.put(min(block, UNBOUNDED), start, min(stop, UNBOUNDED))
            case KeyList(tokens):
                yield _listed(tuple(t for t in tokens if t < UNBOUNDED), KEY_FIRST, KEY_LIST, out)
            case QueryList(tokens):
                yield _listed(tuple(t for t in tokens if t < UNBOUNDED), QUERY_FIRST, QUERY_LIST, out)
            case Powers():
                distances = region.distances(UNBOUNDED)
                yield DISTANCE, out.put_spot(out.put_list(distances), len(distances))
            case _:
                raise AssertionError(f"{region} is an obstacle")
