"""What the pictures show, as integer matrices [length, length]: row = query position, column = key position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longstride.errors import ArgumentError
from longstride.patterns import Pattern, reach
from longstride.plan import plan

# Beyond this many positions a cell is smaller than a pixel, and the matrices below grow with the square.
LONGEST_PICTURE = 1024


@dataclass(frozen=True, eq=False)
class HeadCells:
    """The pairs of the heads that share one pattern.

    Attributes:
        heads: the heads' numbers; empty when all heads are alike.
        labels: one readable line for each part.
        cells: int64 [length, length]; 0 where attention is not allowed, p where part number p (from 1) covers the pair.
    """

    heads: tuple[int, ...]
    labels: tuple[str, ...]
    cells: torch.Tensor

    @property
    def pairs(self) -> int:
        return int((self.cells > 0).sum())


def check_length(length: int) -> None:
    """Raises ArgumentError unless a picture of this many positions can be drawn."""
    if length < 1:
        raise ArgumentError(f"length={length}: a picture needs at least 1 position")
    if length > LONGEST_PICTURE:
        raise ArgumentError(
            f"length={length:,}: a picture shows at most {LONGEST_PICTURE:,} positions; draw fewer, "
            "the pattern does not depend on the length"
        )


def part_cells(pattern: Pattern, length: int, num_heads: int | None = None) -> tuple[HeadCells, ...]:
    """The parts of the pattern's plan, for each group of heads that share one."""
    check_length(length)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    groups = plan(pattern, length, num_heads=num_heads).groups
    drawn = []
    for heads, parts in groups:
        cells = torch.zeros(length, length, dtype=torch.int64)
        for number, part in enumerate(parts, start=1):
            cells[part.allows(query, key).expand(length, length)] = number
        drawn.append(HeadCells(heads if len(groups) > 1 else (), tuple(str(part) for part in parts), cells))
    return tuple(drawn)


def reach_cells(layers: Sequence[Pattern], length: int) -> torch.Tensor:
    """How many of the layers, first layer first, a query needs to draw on a key: int64 [length, length], 0 never."""
    check_length(length)
    needed = torch.zeros(length, length, dtype=torch.int64)
    for count in range(len(layers), 0, -1):
        needed[reach(layers[:count], length)] = count
    return needed


def visible_pairs(causal: bool, length: int) -> int:
    """The pairs of dense attention at this length: what a share is a share of."""
    return length * (length + 1) // 2 if causal else length * length
