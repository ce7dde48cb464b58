"""Lowering: the parts of a plan become launches, numbers and lists that the kernels read. No Triton here.

A kernel cuts one side of the attention matrix, the *owner*, into tiles, and for every tile runs over the *sources*: the
stretches of the other side that the tile meets. The forward and the gradient of q are owned by queries, the gradients
of k and v by keys. The numbers of owners and sources (strides, windows, block sizes) are constants of the compiled
kernel, since divisions by them would cost more than a tile; lengths and lists are run-time arguments.

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
from dataclasses import dataclass, field
from functools import lru_cache

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


@dataclass(frozen=True)
class Launch:
    """One kernel launch over the heads head .. head + heads - 1.

    Attributes:
        owner: LANES .. LIST; owner_index: of its first number.
        step: of the residue classes that it goes along; 1 for all others than LANES.
        columns: for GROUP and LIST, how many positions the owner has; 0 else.
        sources: what each tile runs over.
        numbers: what owners, sources and conditions refer to, constants of the compiled kernel.
        spots: places and counts in the lists, which change with the length: run-time integers.
        parts: what it computes, of the first head.
        cell: rows of a closed cell (class or block) whose queries read no key outside, else 0.
        span: about how many positions of the other side each of the owner's meets, for choosing tile shapes.
    """

    head: int
    heads: int
    owner: int
    owner_index: int
    step: int
    block: int
    columns: int
    sources: tuple[Source, ...]
    numbers: tuple[int, ...]
    spots: tuple[int, ...]
    parts: tuple[Part, ...]
    cell: int
    span: int

    @property
    def whole(self) -> bool:
        """True when the tiles hold every row of the owner's side."""
        return self.owner in (LANES, BLOCKS)


@dataclass(frozen=True)
class Lowered:
    """The launches of a plan: `queries` own the forward and grad_q, `keys` own grad_k and grad_v."""

    queries: tuple[Launch, ...]
    keys: tuple[Launch, ...]
    lists: torch.Tensor = field(hash=False, compare=False)  # int32, on the CPU


class _Writer:
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


def obstacles(plan: Plan) -> list[str]:
    """What in a plan the kernels cannot do; [] when they can do all of it."""
    found: dict[str, None] = {}
    for part in plan.parts:
        for term in (part.term, *part.minus):
            for rule in term.find(Rule):
                found[f"the rule of {rule.pattern} is the user's own Python code, which its kernels cannot call"] = None
        others = [term for term in part.minus if term.find(BlockTable) and not _subtracts(term, part)]
        if len(part.term.find(BlockTable)) > 1 or others:
            found[f"{part} looks pairs up in a second block table, of other blocks"] = None
        if part.term.band is not None and 128 * _step(part.term.band, plan) + plan.kv_len >= 2**31:
            found[f"{part} steps too far for 32-bit positions at {plan.kv_len} keys"] = None
    if plan.kv_len >= UNBOUNDED:
        found[f"{plan.kv_len} keys: at most {UNBOUNDED - 1} fit in 32-bit arithmetic"] = None
    return list(found)


def _subtracts(before: Term, part: Part) -> bool:
    """True when `before` takes whole blocks out of the part's block table."""
    mine, theirs = part.term.find(BlockTable), before.find(BlockTable)
    if len(mine) != 1 or len(theirs) != 1 or mine[0].block != theirs[0].block:
        return False
    rest = Term(before.band, tuple(region for region in before.regions if region != theirs[0]))
    return rest.contains(part.term)


def lower(plan: Plan, kv_heads: int) -> Lowered:
    """The launches that compute `plan` (without obstacles), for kv_heads heads of keys."""
    heads = sum(len(members) for members, _ in plan.groups)
    share = heads // kv_heads
    queries: list[Launch] = []
    keys: list[Launch] = []
    lists: list[torch.Tensor] = [torch.zeros(1, dtype=torch.int32)]
    for first, count, tables in _runs(plan, share):
        parts = tables[0]
        for launches, tilings in (
            (queries, _tilings(plan, parts, "Rows")),
            (keys, _tilings(plan, parts, "Columns")),
        ):
            for owner, members in tilings:
                chosen = [[parts_of_head[index] for index in members] for parts_of_head in tables]
                launches.append(_launch(plan, first, count, owner, chosen, launches is queries, lists))
    for launches in (queries, keys):
        launches.sort(key=lambda launch: not launch.whole)  # what others add to comes first
    return Lowered(tuple(queries), tuple(keys), torch.cat(lists))


# ---- heads ----------------------------------------------------------------------------------------------------------


def _runs(plan: Plan, share: int) -> list[tuple[int, int, list[tuple[Part, ...]]]]:
    """(first head, heads, parts of every head): neighbouring heads whose parts differ in their block tables alone.

    A run either holds whole groups of heads that share keys (`share` heads each) or lies within one.
    """
    of_head = {head: parts for members, parts in plan.groups for head in members}
    runs: list[tuple[int, int, list[tuple[Part, ...]]]] = []
    for head in sorted(of_head):
        parts = of_head[head]
        if runs and _alike(runs[-1][2][0]) == _alike(parts):
            first, count, tables = runs[-1]
            runs[-1] = (first, count + 1, [*tables, parts])
        else:
            runs.append((head, 1, [parts]))
    cut: list[tuple[int, int, list[tuple[Part, ...]]]] = []
    for first, count, tables in runs:
        start, end = first, first + count
        while start < end:
            whole = (end - start) // share * share if start % share == 0 else 0
            stop = start + whole if whole else min(end, (start // share + 1) * share)
            cut.append((start, stop - start, tables[start - first : stop - first]))
            start = stop
    return cut


def _alike(parts: tuple[Part, ...]) -> tuple:
    """What is compared of the parts: everything but what block tables hold."""

    def plain(term: Term) -> tuple:
        return term.band, *(region.block if isinstance(region, BlockTable) else region for region in term.regions)

    return tuple((part.kind, plain(part.term), *map(plain, part.minus), part.skip_rows) for part in parts)


# ---- tilings --------------------------------------------------------------------------------------------------------

Owner = tuple[int, int, tuple[int, ...] | KeyGroup]  # kind, step or block, listed positions or group


def _plain_owner(parts: list[Part]) -> list[tuple[Owner, list[Part]]]:
    """Parts that consecutive positions can own together; each size of block table needs tiles of its own."""
    sizes = sorted({part.term.find(BlockTable)[0].block for part in parts if part.kind == "Table"})
    found: list[tuple[Owner, list[Part]]] = []
    for size in sizes:
        tables = [part for part in parts if part.kind == "Table" and part.term.find(BlockTable)[0].block == size]
        found.append(((BLOCKS, size, ()), tables))
    others = [part for part in parts if part.kind != "Table"]
    if found:
        found[0][1].extend(others)
    elif others:
        found.append(((LANES, 1, ()), others))
    return found


def _step(band: Band, plan: Plan) -> int:
    """The band's dilation; any that passes the length leaves the same pairs, those of a position with itself."""
    return min(band.dilation, plan.kv_len)


def _tilings(plan: Plan, parts: tuple[Part, ...], listed: str) -> list[tuple[Owner, list[int]]]:
    by_step: dict[int, list[Part]] = {}
    plain, alone = [], []
    for part in parts:
        step = _step(part.term.band, plan) if part.kind == "Band" and part.term.band is not None else 1
        if part.kind == listed:
            alone.append(part)
        elif step > 1:
            by_step.setdefault(step, []).append(part)
        else:
            plain.append(part)
    found = _plain_owner(plain)
    found += [((LANES, step, ()), members) for step, members in by_step.items()]
    for part in alone:
        if listed == "Rows":
            found.append(((LIST, 1, part.term.find(QueryList)[0].tokens), [part]))
        else:
            keys = part.term.find(KeyList)
            found.append(((LIST, 1, keys[0].tokens) if keys else (GROUP, 1, _group(part)), [part]))
    return [(owner, [parts.index(part) for part in members]) for owner, members in found]


def _group(part: Part) -> KeyGroup:
    """The sparsest group of a Columns part."""
    return min(part.term.find(KeyGroup), key=lambda region: (region.stop - region.start) / region.block)


# ---- launches -------------------------------------------------------------------------------------------------------


def _launch(
    plan: Plan,
    head: int,
    heads: int,
    owner: Owner,
    parts_of_heads: list[list[Part]],
    queries_own: bool,
    lists: list[torch.Tensor],
) -> Launch:
    kind, step, what = owner
    out = _Writer(lists)
    columns = 0
    first = plan.kv_len - plan.q_len
    if kind == LIST:
        assert isinstance(what, tuple)
        low = first if queries_own else 0
        tokens = [token for token in what if low <= token < plan.kv_len]
        index, columns = out.put_spot(out.put_list(tokens), len(tokens)), len(tokens)
    elif kind == GROUP:
        assert isinstance(what, KeyGroup)
        index = out.put(what.block, what.start, what.stop - what.start)
        columns = int(what.count_before(torch.tensor(plan.kv_len)))
    else:
        index = out.put(step)
    sources = []
    span = 0
    for place, part in enumerate(parts_of_heads[0]):
        of_heads = [parts[place] for parts in parts_of_heads]
        one, width = _source(plan, part, owner, of_heads, queries_own, out)
        sources.append(one)
        span += width
    return Launch(
        head,
        heads,
        kind,
        index,
        step if kind == LANES else 1,
        step if kind == BLOCKS else 0,
        columns,
        tuple(sources),
        tuple(out.numbers),
        tuple(out.spots) or (0, 0),
        tuple(parts_of_heads[0]),
        _cell(plan, parts_of_heads[0], owner),
        span,
    )


def _cell(plan: Plan, parts: list[Part], owner: Owner) -> int:
    """Rows of the cells that are closed under the launch's only part, 0 where they are not."""
    if len(parts) > 1 or owner[0] != LANES:
        return 0
    if parts[0].kind == "Band":
        return -(-plan.kv_len // owner[1])
    if parts[0].kind == "Chunk":
        return min(region.block for region in parts[0].term.find(SameBlock))
    return 0


def _source(
    plan: Plan, part: Part, owner: Owner, of_heads: list[Part], queries_own: bool, out: _Writer
) -> tuple[Source, int]:
    """The source of one part, and about how many positions a tile finds there."""
    kind, step, _ = owner
    term = part.term
    band = term.band or Band(1, None, None)
    unit = step if kind == LANES and part.kind == "Band" else 1
    dilation = _step(band, plan)
    keep = list(_conditions(Term(term.band), out)) if term.band else []
    if unit > 1:
        keep = [(OWN_CLASS if name == CLASS else name, index) for name, index in keep]
    drop = [tuple(_conditions(before, out)) for before in part.minus if not before.find(BlockTable)]
    if part.skip_rows:
        drop.append((_listed(part.skip_rows, QUERY_FIRST, QUERY_LIST, out),))
    # What the owner or the source itself already sees to needs no condition.
    said: list = list(term.find(QueryList)) if part.kind == "Rows" else []
    if part.kind == "Columns":
        said = term.find(KeyList) or [_group(part)]
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


def _table(plan: Plan, of_heads: list[Part], queries_own: bool, out: _Writer) -> tuple[int, int]:
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


def _listed(tokens: tuple[int, ...], first: int, listed: int, out: _Writer) -> Condition:
    """Membership in a list: one comparison where it is the first n positions."""
    if tokens == tuple(range(len(tokens))):
        return first, out.put(len(tokens))
    return listed, out.put_spot(out.put_list(tokens), len(tokens))


def _conditions(term: Term, out: _Writer) -> Iterable[Condition]:
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


@lru_cache(maxsize=128)
def lowered(plan: Plan, kv_heads: int) -> Lowered:
    """`lower`, remembered."""
    with torch.device("cpu"):
        return lower(plan, kv_heads)
