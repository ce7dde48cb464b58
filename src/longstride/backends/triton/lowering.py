"""Lowering: the parts of a plan become launches, numbers and lists that the kernels read. No Triton here.

A kernel cuts one side of the attention matrix, the *owner*, into tiles, and for every tile runs over the *sources*: the
stretches of the other side that the tile meets. The forward and the gradient of q are owned by queries, the gradients
of k and v by keys. The numbers of owners and sources (strides, windows, block sizes) are constants of the compiled
kernel, since divisions by them would cost more than a tile; lengths and lists are run-time arguments.

`sources` says what owners and sources there are, and what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from longstride.backends.triton.sources import (
    BLOCKS,
    GROUP,
    LANES,
    LIST,
    UNBOUNDED,
    Owner,
    Source,
    Writer,
    source_of,
    sparsest_group,
    steps,
)
from longstride.patterns.regions import BlockTable, KeyGroup, KeyList, QueryList, Rule, SameBlock, Term
from longstride.plan import Part, Plan


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
    def grows(self) -> bool:
        """True where later queries meet more and more keys, side by side: tiles that differ in their work."""
        return self.step == 1 and not all(_bounded(part.term) for part in self.parts)

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


def _bounded(term: Term) -> bool:
    """True where a window, a block, a table or a list says how many keys a query meets, whatever its position."""
    window = term.band is not None and term.band.lo is not None and term.band.hi is not None
    return window or any(term.find(kind) for kind in (SameBlock, BlockTable, KeyList, QueryList))


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
        if part.term.band is not None and 128 * steps(part.term.band, plan) + plan.kv_len >= 2**31:
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


def _tilings(plan: Plan, parts: tuple[Part, ...], listed: str) -> list[tuple[Owner, list[int]]]:
    by_step: dict[int, list[Part]] = {}
    plain, alone = [], []
    for part in parts:
        step = steps(part.term.band, plan) if part.kind == "Band" and part.term.band is not None else 1
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
            found.append(((LIST, 1, keys[0].tokens) if keys else (GROUP, 1, sparsest_group(part)), [part]))
    return [(owner, [parts.index(part) for part in members]) for owner, members in found]


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
    out = Writer(lists)
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
        one, width = source_of(plan, part, owner, of_heads, queries_own, out)
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


@lru_cache(maxsize=128)
def lowered(plan: Plan, kv_heads: int) -> Lowered:
    """`lower`, remembered."""
    with torch.device("cpu"):
        return lower(plan, kv_heads)
