"""Which keys one query reads, by number: a walk for each part, that turns a counter into a position.

A walk names at least the keys that its part allows, as few others as arithmetic finds; `Part.allows` cuts those off.
Position i reads ``walk.position(i, n)`` for n = 0, 1, ... below ``walk.count(i)``. Positions below 0 or above i are
not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from longstride.patterns.regions import BlockTable, KeyGroup, KeyList, Powers, QueryList, Term
from longstride.plan.parts import Part
from longstride.plan.storage import Need, rows_for


@dataclass(frozen=True)
class Steps:
    """i - dilation * (lo + n), the nearest first, up to distance dilation * hi (None: to the beginning)."""

    dilation: int
    lo: int
    hi: int | None

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return i - (n + self.lo) * self.dilation

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
        return _listed(self.tokens, n.device)[: len(n)].expand(*i.shape[:-1], -1)

    def count(self, longest: int) -> int:
        return sum(token <= longest for token in self.tokens)


@dataclass(frozen=True)
class Distances:
    """Keys at listed distances, ascending."""

    distances: tuple[int, ...]

    def position(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return i - _listed(self.distances, n.device)[: len(n)]

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

    @property
    def exact(self) -> bool:
        """True when the walk names no key that the part leaves out."""
        plain = not self.part.term.regions and not self.part.minus and not self.part.skip_rows
        return plain and isinstance(self.walk, Steps)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """True where the walk's position j is there, and the part's."""
        there = j >= 0
        if self.exact:
            return there
        return there & (j <= i) & self.part.allows(i, j.clamp(min=0))

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
    choices: list[Walk] = [Steps(dilation, -(-lo // dilation), None if span.most is None else span.most // dilation)]
    for region in term.regions:
        match region:
            case KeyGroup():
                choices.append(Columns(region, lo, span.most))
            case KeyList(tokens):
                choices.append(Listed(tokens))
            case Powers():
                choices.append(Distances(region.distances(capacity)))
            case BlockTable():
                choices.append(Blocks(region, capacity))
            case _:
                pass
    return min(choices, key=lambda walk: walk.count(capacity - 1))


def queries_of(term: Term) -> tuple[int, ...]:
    """The queries that a term is limited to; () for none in particular."""
    lists = term.find(QueryList)
    return lists[0].tokens if lists else ()


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
