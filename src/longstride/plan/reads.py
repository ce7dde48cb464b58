"""Which keys one query reads, by number: a walk for each part, that turns a counter into a position.

A walk names at least the keys that its part allows, as few others as arithmetic finds; `Part.allows` cuts those off.
Position i reads ``walk.position(i, n)`` for n = 0, 1, ... below ``walk.count(i)``. Positions below 0 or above i are
not there.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from longstride.patterns.regions import CAUSAL, BlockTable, KeyGroup, KeyList, Powers, QueryList, SameBlock, Term
from longstride.plan.parts import Part
from longstride.plan.storage import Need, rows_for


@dataclass(frozen=True)
class Steps:
    """i - dilation * (lo + n), the nearest first, up to distance dilation * hi (None: to the beginning).

    With a block, only within the query's own block of so many positions.
    """

    dilation: int
    lo: int
    hi: int | None
    block: int | None = None

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        j = i - (n + self.lo) * self.dilation if self.dilation > 1 or self.lo else i - n
        return j if self.block is None else torch.where(j < i - i % self.block, -1, j)

    def count(self, longest: int) -> int:
        last = longest // self.dilation if self.hi is None else min(self.hi, longest // self.dilation)
        return max(0, last - self.lo + 1)


@dataclass(frozen=True)
class Columns:
    """The keys of a group at distance least or more, the nearest first, up to distance `most` (None: all)."""

    group: KeyGroup
    least: int
    most: int | None

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        number = self.group.count_before((i + (1 - self.least)).clamp(min=0)) - 1 - n
        width = self.group.stop - self.group.start
        position = number // width * self.group.block + self.group.start + number % width
        return torch.where(number < 0, -1, position)

    def count(self, longest: int) -> int:
        window = None if self.most is None else self.most - self.least + 1
        return rows_for(Need(self.group, window), max(0, longest + 1 - self.least))


@dataclass(frozen=True)
class Listed:
    """Listed keys."""

    tokens: tuple[int, ...]

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return _listed(self.tokens, n.device)[: n.shape[0]].expand(*i.shape[:-1], -1)

    def count(self, longest: int) -> int:
        return sum(token <= longest for token in self.tokens)


@dataclass(frozen=True)
class Distances:
    """Keys at listed distances, ascending: those of `powers`, as far as a capacity goes."""

    distances: tuple[int, ...]
    powers: Powers

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return i - _listed(self.distances, n.device)[: n.shape[0]]

    def count(self, longest: int) -> int:
        return sum(distance <= longest for distance in self.distances)


@dataclass(frozen=True)
class Blocks:
    """The keys of the blocks that the query's block lists, up to `capacity` positions."""

    table: BlockTable
    capacity: int

    def blocks(self, device: torch.device) -> torch.Tensor:
        """int32 [query blocks, width]: the key blocks of every query block, -1 where there are fewer than width."""
        return _block_lists(self.table, self.capacity, device)

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        blocks = self.blocks(i.device)[i.squeeze(-1) // self.table.block].long()
        blocks = blocks[..., n // self.table.block]
        return torch.where(blocks < 0, -1, blocks * self.table.block + n % self.table.block)

    def count(self, longest: int) -> int:  # noqa: ARG002 - whatever the block
        return _block_lists(self.table, self.capacity, torch.device("cpu")).shape[1] * self.table.block


Walk = Steps | Columns | Listed | Distances | Blocks


@dataclass(frozen=True)
class Read:
    """The pairs of one part, as far as they lie before a capacity.

    Attributes:
        part: which pairs.
        walk: the positions to look at.
        store: which of its head's stores they lie in.
        queries: the only queries that read at all; () for every query.
    """

    part: Part
    walk: Walk
    store: int
    queries: tuple[int, ...]

    @cached_property
    def open(self) -> Term:
        """What of the part's term the walk leaves open, besides that no key comes after its query."""
        term, walk = self.part.term, self.walk
        band = None if isinstance(walk, Steps) or term.band == CAUSAL else term.band
        return Term(band, tuple(region for region in term.regions if region not in _kept_by(walk)))

    @cached_property
    def dropped(self) -> tuple[Term, ...]:
        """The terms that other parts have, without what holds of every key that does not come after its query."""
        skipped = (Term(None, (QueryList(self.part.skip_rows),)),) if self.part.skip_rows else ()
        return tuple(Term(None, t.regions) if t.band == CAUSAL else t for t in self.part.minus) + skipped

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """True where the walk's position j is there, and the part's."""
        there = j >= 0
        if isinstance(self.walk, Listed | Blocks):
            there = there & (j <= i)
        for condition in _conditions(self.open, i, j):
            there = there & condition
        for term in self.dropped:
            covered = _conditions(term, i, j)
            there = there & ~functools.reduce(operator.and_, covered) if covered else torch.zeros_like(there)
        return there

    def count(self, shortest: int, longest: int) -> int:
        """How many places of the walk the queries at positions shortest .. longest need looking at."""
        if self.queries and not any(shortest <= query <= longest for query in self.queries):
            return 0
        return self.walk.count(longest)


def walk_of(term: Term, capacity: int) -> Walk:
    """The walk that names the fewest keys a query."""
    band, span = term.band, term.span
    dilation = 1 if band is None else band.dilation
    lo = max(0, (span.least or 0)) if span.least is not None else 0
    block = min((region.block for region in term.find(SameBlock)), default=None)
    hi = None if span.most is None else span.most // dilation
    choices: list[Walk] = [Steps(dilation, -(-lo // dilation), hi, block)]
    for region in term.regions:
        match region:
            case KeyGroup():
                choices.append(Columns(region, lo, span.most))
            case KeyList(tokens):
                choices.append(Listed(tokens))
            case Powers():
                choices.append(Distances(region.distances(capacity), region))
            case BlockTable():
                choices.append(Blocks(region, capacity))
            case _:
                pass
    return min(choices, key=lambda walk: walk.count(capacity - 1))


def queries_of(term: Term) -> tuple[int, ...]:
    """The queries that a term is limited to; () for none in particular."""
    lists = term.find(QueryList)
    return lists[0].tokens if lists else ()


def _kept_by(walk: Walk) -> set[object]:
    """The regions that the walk stays within by itself."""
    match walk:
        case Steps():
            return {SameBlock(walk.block)} if walk.block is not None else set()
        case Columns():
            return {walk.group}
        case Listed():
            return {KeyList(walk.tokens)}
        case Distances():
            return {walk.powers}
        case Blocks():
            return {walk.table}


def _conditions(term: Term, i: torch.Tensor, j: torch.Tensor) -> list[torch.Tensor]:
    """What a pair must meet to be the term's, in as few operations as it takes; j may be negative where it is not."""
    found = [] if term.band is None else [term.band.allows(i, j)]
    for region in term.regions:
        match region:
            case SameBlock(block):
                found.append(i // block == j // block)
            case KeyGroup(block, start, stop):
                place = j % block
                found.append(place < stop if start == 0 else (place >= start) & (place < stop))
            case _:
                found.append(region.allows(i, j.clamp(min=0)))
    return found


@lru_cache(maxsize=256)
def _listed(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=256)
def _block_lists(table: BlockTable, capacity: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return _block_lists(table, capacity, torch.device("cpu")).to(device)
    with torch.device("cpu"):
        pairs = table.blocks(capacity, capacity)
        pairs = pairs[pairs[:, 0] >= pairs[:, 1]]
        blocks = -(-capacity // table.block)
        counts = pairs[:, 0].bincount(minlength=blocks)
        lists = torch.full((blocks, max(1, int(counts.max()))), -1, dtype=torch.int32)
        first = counts.cumsum(0) - counts
        lists[pairs[:, 0], torch.arange(len(pairs)) - first[pairs[:, 0]]] = pairs[:, 1].int()
    return lists
