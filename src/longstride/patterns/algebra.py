"""Joining patterns: unions, intersections, and one rule a head."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import torch

from longstride.errors import PatternError
from longstride.patterns.base import Pattern
from longstride.patterns.regions import Term


@dataclass(frozen=True, repr=False)
class _Joined(Pattern):
    """What unions and intersections share: a flat tuple of members, heads and tables taken from them."""

    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, *patterns: Pattern) -> Pattern:
        """Join patterns into one flat value; a member that is there already is not repeated."""
        flat: list[Pattern] = []
        for pattern in patterns:
            for member in pattern.patterns if isinstance(pattern, cls) else (pattern,):
                if member not in flat:
                    flat.append(member)
        return flat[0] if len(flat) == 1 else cls(tuple(flat))

    @property
    def num_heads(self) -> int | None:
        counts = [member.num_heads for member in self.patterns if member.num_heads is not None]
        return math.lcm(*counts) if counts else None

    def split_heads(self, num_heads: int) -> tuple[Pattern, ...]:
        members = [member.split_heads(num_heads) for member in self.patterns]
        return tuple(type(self).of(*rules) for rules in zip(*members, strict=True))

    def tables(self) -> dict[str, torch.Tensor]:
        return {name: table for member in self.patterns for name, table in member.tables().items()}

    def bind(self, kv_len: int) -> Pattern:
        return type(self)(tuple(member.bind(kv_len) for member in self.patterns))

    @property
    def repeats_every(self) -> int | None:
        return _common(self.patterns)

    def _retained(self, next_position: int) -> list[torch.Tensor]:
        # A row for every head where heads differ; members with fewer rows serve equal groups.
        kept, heads = [member.retained(next_position) for member in self.patterns], self.num_heads or 1
        return [rows if rows.dim() == 1 else rows.repeat_interleave(heads // len(rows), 0) for rows in kept]

    def _allowed(self, i: torch.Tensor, j: torch.Tensor) -> list[torch.Tensor]:
        # Members that tell heads apart put a head axis in front; give the others one to match.
        heads = self.num_heads
        if heads is None:
            return [member.allows(i, j) for member in self.patterns]
        return [torch.stack([r.allows(i, j) for r in member.split_heads(heads)]) for member in self.patterns]


@dataclass(frozen=True, repr=False)
class Union(_Joined):
    """``a | b``: pairs that any member allows, each pair once in one softmax."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return functools.reduce(operator.or_, self._allowed(i, j))

    @property
    def is_causal(self) -> bool:
        return all(member.is_causal for member in self.patterns)

    def retained(self, next_position: int) -> torch.Tensor:
        return functools.reduce(operator.or_, self._retained(next_position))

    def terms(self) -> tuple[Term, ...]:
        return tuple(dict.fromkeys(term for member in self.patterns for term in member.terms()))

    def __str__(self) -> str:
        return " | ".join(str(member) for member in self.patterns)


@dataclass(frozen=True, repr=False)
class Intersection(_Joined):
    """``a & b``: pairs that every member allows."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return functools.reduce(operator.and_, self._allowed(i, j))

    @property
    def is_causal(self) -> bool:
        if any(member.is_causal for member in self.patterns):
            return True
        # Together they may leave nothing ahead although each has something there.
        return self.num_heads is None and all(
            (term.span.least or 0) >= 0 and term.span.least is not None for term in self.terms()
        )

    def retained(self, next_position: int) -> torch.Tensor:
        # A key that one member has finished with is finished; a key that each may still read might be kept too long.
        return functools.reduce(operator.and_, self._retained(next_position))

    def terms(self) -> tuple[Term, ...]:
        joined: list[Term] = [Term()]
        for member in self.patterns:
            products = [left.intersect(right) for left in joined for right in member.terms()]
            joined = [term for term in products if term is not None]
        return tuple(dict.fromkeys(joined))

    def __str__(self) -> str:
        return " & ".join(f"({member})" if isinstance(member, Union) else str(member) for member in self.patterns)


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Head h of H uses ``patterns[h * len(patterns) // H]``: equal groups of neighbouring heads share a pattern.

    Groups are neighbours, as the query heads that share a key head are in grouped-query attention, so a group's keys
    are a slice. Source: Child 2019, section 4.3 (b), heads with different patterns.
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.patterns:
            raise PatternError("per_head(): give at least one pattern")
        for member in self.patterns:
            if not isinstance(member, Pattern):
                raise PatternError(f"per_head({member!r}): every member must be a pattern")
            if member.num_heads is not None:
                raise PatternError(
                    f"per_head({member}): a member must not be per head itself; list its patterns instead"
                )
        super().__post_init__()

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """As `Pattern.allows`, with a head axis of len(patterns) in front."""
        i, j = torch.as_tensor(i), torch.as_tensor(j)
        shape = torch.broadcast_shapes(i.shape, j.shape)
        return torch.stack([rule.allows(i, j).expand(shape) for rule in self.split_heads(len(self.patterns))])

    @property
    def is_causal(self) -> bool:
        return all(member.is_causal for member in self.patterns)

    @property
    def repeats_every(self) -> int | None:
        return _common(self.patterns)

    def retained(self, next_position: int) -> torch.Tensor:
        """bool [len(patterns), next_position]: a row for every pattern."""
        return torch.stack([member.retained(next_position) for member in self.patterns])

    def terms(self) -> tuple[Term, ...]:
        raise PatternError(f"{self}: heads differ; take the rule of every head with split_heads(num_heads)")

    def bind(self, kv_len: int) -> Pattern:
        return PerHead(tuple(member.bind(kv_len) for member in self.patterns))

    @property
    def num_heads(self) -> int | None:
        return len(self.patterns)

    def split_heads(self, num_heads: int) -> tuple[Pattern, ...]:
        if num_heads % len(self.patterns):
            raise PatternError(
                f"{self}: {num_heads} heads do not divide into {len(self.patterns)} equal groups; "
                f"use a multiple of {len(self.patterns)} heads or another number of patterns"
            )
        group = num_heads // len(self.patterns)
        # A member may draw per head itself (RandomBlocks): give each head its own draw.
        return tuple(self.patterns[head // group].split_heads(num_heads)[head] for head in range(num_heads))

    def tables(self) -> dict[str, torch.Tensor]:
        return {name: table for member in self.patterns for name, table in member.tables().items()}

    def __str__(self) -> str:
        return f"per_head({', '.join(str(member) for member in self.patterns)})"


def per_head(*patterns: Pattern) -> PerHead:
    """One pattern a head: ``per_head(Local(128), Strided(128))`` gives the first half of the heads the window.

    Args:
        patterns: as many as heads, or fewer: each then serves an equal group of neighbouring heads.
    """
    return PerHead(patterns)


def _common(patterns: tuple[Pattern, ...]) -> int | None:
    """The least shift that changes none of the patterns, if each has one."""
    shifts = [pattern.repeats_every for pattern in patterns]
    return math.lcm(*shifts) if all(shifts) else None  # ty: ignore[invalid-argument-type]
