"""The shapes of tile that library kernels are given: pure arithmetic, no tensors but for block tables.

Positions are absolute; a row is a query's place among the q_len queries, so a query at position p has row
p - (kv_len - q_len).

- `Dense`: regular tiles without a mask (or causal), as strided views of q, k and v: one fused kernel call.
- `Window`: a finite band; every tile of queries reads its own and the few preceding tiles of keys.
- `Masked` and `Listed`: tiles given by the positions of their queries and keys, with the part's rule looked up inside.
- `Shifts`: single diagonals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longstride.patterns.regions import KeyGroup
from longstride.plan.parts import Part


@dataclass(frozen=True)
class Dense:
    """`batch` tiles of q_rows x k_rows; row r of tile t is at ``q_start + t * q_step + r * stride``, keys likewise.

    Attributes:
        q_start, q_step: in rows. k_start, k_step: in positions, or in compacted keys where `keys` is given.
        stride: from a row (and key) of a tile to the next.
        causal: row r of a tile reads its keys 0 .. r; q_rows == k_rows then.
        keys: the compacted keys that k_start and k_step count.
    """

    batch: int
    q_rows: int
    k_rows: int
    q_start: int
    q_step: int
    k_start: int
    k_step: int
    stride: int = 1
    causal: bool = False
    keys: KeyGroup | None = None

    @property
    def scored_pairs(self) -> int:
        return self.batch * (self.q_rows * (self.q_rows + 1) // 2 if self.causal else self.q_rows * self.k_rows)


@dataclass(frozen=True)
class Window:
    """Class distance 0 .. window - 1 in every residue class mod dilation, by tiles of `rows` rows a class.

    The queries are rows q_start .. q_start + q_len - 1 and lie last among the keys 0 .. kv_len - 1. Every tile reads
    its own and the `back` preceding tiles of keys. With `flip` all of q, k, v are first reversed in time.
    """

    q_start: int
    q_len: int
    kv_len: int
    dilation: int
    window: int
    rows: int
    flip: bool = False

    @property
    def back(self) -> int:
        return -(-(self.window - 1) // self.rows)

    @property
    def tiles(self) -> int:
        return -(-self.q_len // (self.rows * self.dilation))

    @property
    def scored_pairs(self) -> int:
        return self.tiles * self.dilation * self.rows * self.rows * (self.back + 1)


@dataclass(frozen=True)
class Grid:
    """Positions ``start + lane * lane_step + tile * tile_step + row * row_step``, as int64 [lanes * tiles, rows].

    Those outside low .. high - 1 become -1 (padding). With `of`, they count into that key group or list instead.
    """

    start: int
    tiles: int
    rows: int
    tile_step: int
    row_step: int = 1
    lanes: int = 1
    lane_step: int = 1
    low: int = 0
    high: int = 0
    of: KeyGroup | tuple[int, ...] | None = None

    def positions(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """The positions of tiles first .. last - 1 (lane-major)."""
        tile = torch.arange(first, last, device=device)
        origin = self.start + tile // self.tiles * self.lane_step + tile % self.tiles * self.tile_step
        position = origin[:, None] + torch.arange(self.rows, device=device) * self.row_step
        outside = position < 0
        if isinstance(self.of, KeyGroup):
            count = self.of.stop - self.of.start
            position = position // count * self.of.block + self.of.start + position % count
        elif self.of is not None:
            listed = torch.tensor(self.of, device=device)
            outside = outside | (position >= len(listed))
            position = listed[position.clamp(0, len(listed) - 1)]
        return torch.where(outside | (position < self.low) | (position >= self.high), -1, position)


@dataclass(frozen=True)
class Masked:
    """Tiles whose queries and keys are grids of positions; the part's rule is looked up for every pair."""

    part: Part
    q: Grid
    k: Grid

    @property
    def count(self) -> int:
        return self.q.lanes * self.q.tiles

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.rows, self.k.rows

    def positions(self, first: int, last: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q.positions(first, last, device), self.k.positions(first, last, device)

    @property
    def scored_pairs(self) -> int:
        return self.count * self.q.rows * self.k.rows


@dataclass(frozen=True, eq=False)
class Listed:
    """Masked tiles from a table: row n of `k_blocks` lists the key blocks of query block q_blocks[n], -1 for none.

    q_blocks int64 [n], k_blocks int64 [n, most]. Decoded: ``for n: for b in k_blocks[n]: if b >= 0: (q_blocks[n], b)``.
    """

    part: Part
    block: int
    q_blocks: torch.Tensor
    k_blocks: torch.Tensor
    q_low: int
    kv_len: int

    @property
    def count(self) -> int:
        return len(self.q_blocks)

    @property
    def shape(self) -> tuple[int, int]:
        return self.block, self.k_blocks.shape[1] * self.block

    def positions(self, first: int, last: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(self.block, device=device)
        q = self.q_blocks[first:last].to(device)[:, None] * self.block + place
        blocks = self.k_blocks[first:last].to(device)[:, :, None]
        k = torch.where(blocks < 0, -1, blocks * self.block + place).flatten(1)
        inside = (q >= self.q_low) & (q < self.kv_len)
        return torch.where(inside, q, -1), torch.where(k < self.kv_len, k, -1)

    @property
    def scored_pairs(self) -> int:
        return self.count * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Shifts:
    """Single diagonals i - j = offset."""

    part: Part
    offsets: tuple[int, ...]
    q_len: int

    @property
    def scored_pairs(self) -> int:
        return len(self.offsets) * self.q_len


Tile = Dense | Window | Masked | Listed | Shifts
