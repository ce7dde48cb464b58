"""Regions: the few regular shapes of allowed pairs that every pattern is a union of intersections of.

A `Term` is an intersection of regions, a pattern is a union of terms. Both counting and planning work on terms, so a
new pattern needs no code there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from longstride.patterns.base import Pattern


#: No position lies farther than this, so offsets beyond it need not be told apart (and fit in int64).
FARTHEST = 2**62


class Region(Protocol):
    """A set of (query, key) pairs given by its membership rule."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Band:
    """Pairs with i - j = dilation * m and lo <= m <= hi; None leaves that side open. Band(1, 0, None) is causal."""

    dilation: int
    lo: int | None
    hi: int | None

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        offset = torch.as_tensor(i - j)
        allowed = offset % self.dilation == 0 if self.dilation > 1 else torch.ones_like(offset, dtype=torch.bool)
        if self.least is not None:
            allowed = allowed & (offset >= max(-FARTHEST, min(FARTHEST, self.least)))
        if self.most is not None:
            allowed = allowed & (offset <= max(-FARTHEST, min(FARTHEST, self.most)))
        return allowed

    @property
    def least(self) -> int | None:
        """The least offset i - j, None for minus infinity."""
        return None if self.lo is None else self.lo * self.dilation

    @property
    def most(self) -> int | None:
        """The greatest offset i - j, None for infinity."""
        return None if self.hi is None else self.hi * self.dilation

    def intersect(self, other: Band) -> Band | None:
        """Multiples of both dilations within both ranges: a band again, or None when nothing is left."""
        dilation = min(math.lcm(self.dilation, other.dilation), FARTHEST)
        least = [bound for bound in (self.least, other.least) if bound is not None]
        most = [bound for bound in (self.most, other.most) if bound is not None]
        lo = -(-max(least) // dilation) if least else None
        hi = min(most) // dilation if most else None
        return None if lo is not None and hi is not None and lo > hi else Band(dilation, lo, hi)

    def contains(self, other: Band) -> bool:
        if other.lo is not None and other.lo == other.hi:
            return self.intersect(other) is not None
        below = self.least is None or (other.least is not None and other.least >= self.least)
        above = self.most is None or (other.most is not None and other.most <= self.most)
        return other.dilation % self.dilation == 0 and below and above

    def without(self, other: Band) -> tuple[Band, ...] | None:
        """The bands that make up this one less `other`, or None where the rest is not a union of bands."""
        if self.dilation % other.dilation:
            return None
        pieces = []
        if other.least is not None:
            pieces.append(Band(1, None, other.least - 1))
        if other.most is not None:
            pieces.append(Band(1, other.most + 1, None))
        return tuple(rest for piece in pieces if (rest := self.intersect(piece)) is not None)


CAUSAL = Band(1, 0, None)


@dataclass(frozen=True)
class SameBlock:
    """Pairs whose positions lie in the same block: i // block == j // block."""

    block: int

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i // self.block == j // self.block


@dataclass(frozen=True)
class KeyGroup:
    """Keys with start <= j % block < stop: the summary positions of every block."""

    block: int
    start: int
    stop: int

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        i, j = torch.as_tensor(i), torch.as_tensor(j)
        place = j % self.block
        return ((place >= self.start) & (place < self.stop)).expand(torch.broadcast_shapes(i.shape, j.shape))

    def positions(self, kv_len: int) -> torch.Tensor:
        blocks = torch.arange(0, kv_len, self.block)[:, None]
        keys = (blocks + torch.arange(self.start, max(self.start, min(self.stop, kv_len)))).flatten()
        return keys[keys < kv_len]

    def count_before(self, position: torch.Tensor) -> torch.Tensor:
        """How many of the group's positions lie before `position`, elementwise."""
        blocks, place = position // self.block, position % self.block
        return blocks * (self.stop - self.start) + (place - self.start).clamp(0, self.stop - self.start)


def _member(position: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    if tokens == tuple(range(len(tokens))):  # the usual case, "the first n", is one comparison
        return position < len(tokens)
    if len(tokens) > 32:
        return torch.isin(position, torch.tensor(tokens, device=position.device))
    # Few comparisons can be traced and vectorised (as a mask_mod), which isin cannot.
    return (position[..., None] == torch.tensor(tokens, device=position.device)).any(-1)


@dataclass(frozen=True)
class KeyList:
    """Keys named one by one (ascending): global tokens as keys."""

    tokens: tuple[int, ...]

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        i, j = torch.as_tensor(i), torch.as_tensor(j)
        return _member(j, self.tokens).expand(torch.broadcast_shapes(i.shape, j.shape))

    def positions(self, kv_len: int) -> torch.Tensor:
        return torch.tensor([token for token in self.tokens if token < kv_len], dtype=torch.int64)

    def count_before(self, position: torch.Tensor) -> torch.Tensor:
        """How many of the listed positions lie before `position`, elementwise."""
        return torch.searchsorted(torch.tensor(self.tokens), position)


@dataclass(frozen=True)
class QueryList:
    """Queries named one by one (ascending): global tokens as queries."""

    tokens: tuple[int, ...]

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        i, j = torch.as_tensor(i), torch.as_tensor(j)
        return _member(i, self.tokens).expand(torch.broadcast_shapes(i.shape, j.shape))


@dataclass(frozen=True)
class Powers:
    """Pairs at distance 0 or a power of `base`: |i - j| in {0, 1, base, base^2, ...}, both sides."""

    base: int

    def distances(self, length: int) -> tuple[int, ...]:
        """The distances shorter than `length`, ascending."""
        found, power = [0], 1
        while power < length:
            found.append(power)
            power *= self.base
        return tuple(found)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        distance = torch.as_tensor(i - j).abs()
        allowed = distance == 0
        for power in self.distances(2**62)[1:]:
            allowed = allowed | (distance == power)
        return allowed


class Blockwise(Protocol):
    """A pattern that says which pairs of blocks may attend."""

    def block_allows(self, q_block: torch.Tensor, kv_block: torch.Tensor) -> torch.Tensor:
        """True where the pair of blocks is allowed; broadcasts."""
        ...

    def block_pairs(self, q_len: int, kv_len: int) -> torch.Tensor:
        """int64 [n, 2]: the allowed (query block, key block) pairs that meet these lengths, by query block."""
        ...


@dataclass(frozen=True)
class BlockTable:
    """Pairs by block of a `BlockSparse` or `RandomBlocks` pattern, without that pattern's own causal cut."""

    source: Blockwise
    block: int

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.source.block_allows(i // self.block, j // self.block)

    def blocks(self, q_len: int, kv_len: int) -> torch.Tensor:
        """int64 [n, 2]: the (query block, key block) pairs that meet these lengths, by query block."""
        return self.source.block_pairs(q_len, kv_len)


@dataclass(frozen=True)
class Rule:
    """A user's own `Pattern.allows`, of which nothing more is known."""

    pattern: Pattern

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.pattern.allows(i, j).expand(torch.broadcast_shapes(i.shape, j.shape))


@dataclass(frozen=True)
class Term:
    """An intersection of regions with at most one `Band`, as few others as say the same, in a fixed order."""

    band: Band | None = None
    regions: tuple[Region, ...] = ()

    @staticmethod
    def of(*regions: Region) -> Term:
        term = Term()
        for region in regions:
            joined = term.intersect(Term(region) if isinstance(region, Band) else Term(None, (region,)))
            assert joined is not None, "a pattern never describes an empty term"
            term = joined
        return term

    def intersect(self, other: Term) -> Term | None:
        """Pairs of both, or None where they are seen to share none."""
        band = self.band or other.band
        if self.band is not None and other.band is not None:
            band = self.band.intersect(other.band)
            if band is None:
                return None
        band = None if band == Band(1, None, None) else band
        regions = list(self.regions)
        for region in other.regions:
            if not _narrow(regions, region):
                return None
        span = min((region.block for region in regions if isinstance(region, SameBlock)), default=None)
        if span is not None and band is not None and band.intersect(Band(1, 1 - span, span - 1)) is None:
            return None
        return Term(band, tuple(sorted(regions, key=lambda region: (type(region).__name__, str(region)))))

    @cached_property
    def span(self) -> Band:
        """The tightest band known to hold every pair of the term."""
        span = self.band or Band(1, None, None)
        for region in self.regions:
            if isinstance(region, SameBlock):
                tighter = span.intersect(Band(1, 1 - region.block, region.block - 1))
                assert tighter is not None
                span = tighter
        return span

    def contains(self, other: Term) -> bool:
        """True when every pair of `other` is seen to be one of this term's."""
        if self.band is not None and not self.band.contains(other.span):
            return False
        return all(any(_implies(theirs, mine) for theirs in other.regions) for mine in self.regions)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)
        if self.band is not None:
            allowed = allowed & self.band.allows(i, j)
        for region in self.regions:
            allowed = allowed & region.allows(i, j)
        return allowed

    def find(self, kind: type) -> list:
        """The regions of one kind."""
        return [region for region in self.regions if isinstance(region, kind)]


def _narrow(regions: list[Region], new: Region) -> bool:
    """Add `new` to an intersection in place, merging where one region can say it; False when nothing is left."""
    for index, old in enumerate(regions):
        if _implies(old, new):
            return True
        if _implies(new, old):
            regions[index] = new
            return True
        for kind in (KeyList, QueryList):
            if isinstance(old, kind) and isinstance(new, kind):
                shared = tuple(token for token in old.tokens if token in set(new.tokens))
                regions[index] = kind(shared)
                return bool(shared)
        if isinstance(old, KeyGroup) and isinstance(new, KeyGroup) and old.block == new.block:
            start, stop = max(old.start, new.start), min(old.stop, new.stop)
            regions[index] = KeyGroup(old.block, start, stop)
            return start < stop
    regions.append(new)
    return True


def without_contained(terms: Sequence[Term]) -> list[Term]:
    """`terms` less those that another one holds whole: the same union."""
    kept: list[Term] = []
    for term in terms:
        if not any(other.contains(term) for other in kept):
            kept = [other for other in kept if not term.contains(other)] + [term]
    return kept


def _implies(narrow: Region, wide: Region) -> bool:
    """True when membership in `narrow` is seen to give membership in `wide`."""
    if narrow == wide:
        return True
    if isinstance(narrow, SameBlock) and isinstance(wide, SameBlock):
        return wide.block % narrow.block == 0
    for kind in (KeyList, QueryList):
        if isinstance(narrow, kind) and isinstance(wide, kind):
            return set(narrow.tokens) <= set(wide.tokens)
    if isinstance(narrow, KeyGroup) and isinstance(wide, KeyGroup) and narrow.block == wide.block:
        return wide.start <= narrow.start and narrow.stop <= wide.stop
    return False
