"""Patterns that see positions by the block they lie in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from longstride.errors import PatternError
from longstride.patterns.base import Pattern, cached, flag, whole
from longstride.patterns.regions import CAUSAL, BlockTable, KeyGroup, SameBlock, Term


@dataclass(frozen=True, repr=False)
class BlockLocal(Pattern):
    """``i // block == j // block`` (and ``j <= i``): attention within one's own block.

    >>> import longstride as ls
    >>> print(ls.picture(ls.BlockLocal(3), 8))
    # . . . . . . .
    # # . . . . . .
    # # # . . . . .
    . . . # . . . .
    . . . # # . . .
    . . . # # # . .
    . . . . . . # .
    . . . . . . # #

    Args:
        block: positions a block.
        causal: False reads the later keys of the block too.

    Source: Child 2019, section 4.3, A(1) of fixed attention.
    """

    block: int
    causal: bool = True

    def __post_init__(self) -> None:
        whole("BlockLocal", "block", self.block, 1)
        flag("BlockLocal", "causal", self.causal)
        super().__post_init__()

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        same = i // self.block == j // self.block
        return same & (j <= i) if self.causal else same

    @property
    def is_causal(self) -> bool:
        return self.causal or self.block == 1

    @property
    def repeats_every(self) -> int:
        return self.block

    def retained(self, next_position: int) -> torch.Tensor:
        return cached(next_position) // self.block == next_position // self.block

    def terms(self) -> tuple[Term, ...]:
        return (Term.of(SameBlock(self.block), CAUSAL) if self.causal else Term.of(SameBlock(self.block)),)


@dataclass(frozen=True, repr=False)
class Summary(Pattern):
    """``j <= i`` and ``block - offset - count <= j % block < block - offset``: the last positions of every block.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Summary(4, 1), 8))
    . . . . . . . .
    . . . . . . . .
    . . . . . . . .
    . . . # . . . .
    . . . # . . . .
    . . . # . . . .
    . . . # . . . .
    . . . # . . . #

    Args:
        block: positions a block.
        count: summary positions a block (the paper's c, 8 to 32 for blocks of 128).
        offset: how many positions before the block's end the group stops, so that heads can use distinct ones.

    Source: Child 2019, section 4.3, A(2) of fixed attention.
    """

    block: int
    count: int
    offset: int = 0

    def __post_init__(self) -> None:
        whole("Summary", "block", self.block, 1)
        whole("Summary", "count", self.count, 1)
        whole("Summary", "offset", self.offset, 0)
        if self.count + self.offset > self.block:
            raise PatternError(
                f"Summary(block={self.block}, count={self.count}, offset={self.offset}): "
                f"count + offset must be at most block"
            )
        super().__post_init__()

    def _group(self) -> KeyGroup:
        return KeyGroup(self.block, self.block - self.offset - self.count, self.block - self.offset)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self._group().allows(i, j) & (j <= i)

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def repeats_every(self) -> int:
        return self.block

    def retained(self, next_position: int) -> torch.Tensor:
        j = cached(next_position)
        return self._group().allows(j, j)

    def terms(self) -> tuple[Term, ...]:
        return (Term.of(self._group(), CAUSAL),)


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    """``BlockLocal(block) | Summary(block, summary, offset)``: one's own block, and every earlier block's summary.

    >>> import longstride as ls
    >>> print(ls.picture(ls.Fixed(4, 1), 8))
    # . . . . . . .
    # # . . . . . .
    # # # . . . . .
    # # # # . . . .
    . . . # # . . .
    . . . # # # . .
    . . . # # # # .
    . . . # # # # #

    Args:
        block, summary, offset: as in `BlockLocal` and `Summary` (its count).

    Source: Child 2019, section 4.3, fixed attention, both parts in one head (enwik8: block 128, c = 32).
    """

    block: int
    summary: int
    offset: int = 0

    def __post_init__(self) -> None:
        whole("Fixed", "block", self.block, 1)
        whole("Fixed", "summary", self.summary, 1)
        whole("Fixed", "offset", self.offset, 0)
        if self.summary + self.offset > self.block:
            raise PatternError(
                f"Fixed(block={self.block}, summary={self.summary}, offset={self.offset}): "
                f"summary + offset must be at most block"
            )
        super().__post_init__()

    def _members(self) -> tuple[Pattern, Pattern]:
        return BlockLocal(self.block), Summary(self.block, self.summary, self.offset)

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        own, earlier = self._members()
        return own.allows(i, j) | earlier.allows(i, j)

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def repeats_every(self) -> int:
        return self.block

    def retained(self, next_position: int) -> torch.Tensor:
        own, earlier = self._members()
        return own.retained(next_position) | earlier.retained(next_position)

    def terms(self) -> tuple[Term, ...]:
        own, earlier = self._members()
        return own.terms() + earlier.terms()


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    """Every block of queries reads `count` distinct blocks of keys, drawn by a hash of (seed, head, query block).

    Causal draws come from the query block's own and earlier blocks (all of them while there are fewer than `count`),
    with ``j <= i``, so they stay as they are when the sequence grows. Otherwise they come from all blocks of the
    sequence, so they depend on how long it is; `allows` then takes the greatest `j` that it is given for the last key,
    and everything that knows the length (`mask`, `pairs`, plans, attention) uses that.

    Args:
        block: positions a block.
        count: distinct key blocks a query block.
        seed: another seed, another draw. Nothing is stored, and every device draws the same.
        causal: False draws later blocks too.
        head: which head's draw this is; `split_heads` sets it.

    Source: BigBird, random attention by blocks.
    """

    block: int
    count: int
    seed: int = 0
    causal: bool = True
    head: int = 0
    blocks: int | None = None  # the sequence's blocks, once a length is known

    def __post_init__(self) -> None:
        whole("RandomBlocks", "block", self.block, 1)
        whole("RandomBlocks", "count", self.count, 1)
        whole("RandomBlocks", "seed", self.seed, 0)
        flag("RandomBlocks", "causal", self.causal)
        whole("RandomBlocks", "head", self.head, 0)
        if self.blocks is not None:
            whole("RandomBlocks", "blocks", self.blocks, 1)
        super().__post_init__()

    def bind(self, kv_len: int) -> Pattern:
        return self if self.causal else replace(self, blocks=-(-kv_len // self.block))

    def split_heads(self, num_heads: int) -> tuple[Pattern, ...]:
        return tuple(replace(self, head=self.head + head) for head in range(num_heads))

    def draws(self, q_block: torch.Tensor, blocks: int | None = None) -> torch.Tensor:
        """The key blocks of each query block.

        Args:
            q_block: int64 tensor of query blocks, any shape.
            blocks: blocks of the sequence, for a draw that is not causal.

        Returns:
            int64 [*q_block.shape, count]: distinct blocks; -1 where there are fewer than `count`.
        """
        q_block = q_block.to(torch.int64)  # the hash needs the room
        available = q_block + 1 if self.causal else torch.full_like(q_block, blocks or 1)
        chosen: list[torch.Tensor] = []
        # Floyd's sampling: `count` distinct values out of `available`, in `count` steps, for all query blocks at once.
        for step in range(self.count):
            top = available - self.count + step
            draw = _hash(self.seed, self.head, q_block, step) % (top + 1).clamp(min=1)
            for earlier in chosen:
                draw = torch.where(earlier == draw, top, draw)
            few = torch.full_like(draw, step)
            few = torch.where(few < available, few, -1)
            chosen.append(torch.where(available >= self.count, draw, few))
        return torch.stack(chosen, -1)

    def block_allows(self, q_block: torch.Tensor, kv_block: torch.Tensor) -> torch.Tensor:
        q_block, kv_block, blocks = torch.as_tensor(q_block), torch.as_tensor(kv_block), self.blocks
        if blocks is None and not self.causal:
            blocks = int(kv_block.max()) + 1
        draws = self.draws(q_block, blocks)
        allowed = draws[..., 0] == kv_block
        for step in range(1, self.count):
            allowed = allowed | (draws[..., step] == kv_block)
        return allowed

    def block_pairs(self, q_len: int, kv_len: int) -> torch.Tensor:
        q_block = torch.arange((kv_len - q_len) // self.block, -(-kv_len // self.block))
        blocks = -(-kv_len // self.block)
        # All there are is as many as can be drawn.
        draws = replace(self, count=min(self.count, blocks)).draws(q_block, blocks).sort(-1).values
        pairs = torch.stack([q_block[:, None].expand_as(draws), draws], -1).flatten(0, 1)
        return pairs[pairs[:, 1] >= 0]

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        allowed = self.block_allows(i // self.block, j // self.block)
        return allowed & (j <= i) if self.causal else allowed

    @property
    def is_causal(self) -> bool:
        return self.causal

    def terms(self) -> tuple[Term, ...]:
        table = BlockTable(self, self.block)
        return (Term.of(table, CAUSAL) if self.causal else Term.of(table),)


def _hash(seed: int, head: int, q_block: torch.Tensor, step: int) -> torch.Tensor:
    """A 32-bit counter-based hash in int64 arithmetic, the same on every device (constants: lowbias32, C. Wellons)."""
    mixed = torch.full_like(q_block, seed & 0xFFFFFFFF)
    for word in (seed >> 32, head, q_block, step):
        mixed = (mixed ^ word) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
        mixed = (mixed * 0x7FEB352D) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 15)
        mixed = (mixed * 0x846CA68B) & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 16)) + 0x9E3779B9
    return mixed & 0xFFFFFFFF


class BlockSparse(Pattern):
    """``table[(head,) i // block, j // block]``: a block layout of one's own; ``& Causal()`` makes it causal.

    >>> import longstride as ls, torch
    >>> print(ls.picture(ls.BlockSparse(torch.eye(2, dtype=torch.bool), 2), 4))
    # # . .
    # # . .
    . . # #
    . . # #

    Args:
        table: bool [q_blocks, kv_blocks], or [heads, q_blocks, kv_blocks] for a layout a head. It is copied. Positions
            past its last block are an error, since nothing is said about them.
        block: positions a block.

    The text form names the table by its content (``BlockSparse(table_0123456789ab, 64)``); `tables()` gives it, and
    ``parse(text, tables)`` reads the two together.

    Source: OpenAI blocksparse.
    """

    def __init__(self, table: torch.Tensor, block: int) -> None:
        self.block = whole("BlockSparse", "block", block, 1)
        if not isinstance(table, torch.Tensor) or table.dtype != torch.bool or table.dim() not in (2, 3):
            found = f"{table.dtype} {list(table.shape)}" if isinstance(table, torch.Tensor) else type(table).__name__
            raise PatternError(
                f"BlockSparse(table={found}): table must be a bool tensor [q_blocks, kv_blocks] or "
                f"[heads, q_blocks, kv_blocks]"
            )
        if 0 in table.shape:
            raise PatternError(f"BlockSparse(table of shape {list(table.shape)}): table must not be empty")
        self.table = table.detach().cpu().clone()
        content = bytes(str(list(table.shape)), "ascii") + bytes(self.table.flatten().to(torch.uint8).tolist())
        self.table_name = "table_" + hashlib.sha256(content).hexdigest()[:12]
        self.__post_init__()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockSparse) and (self.table_name, self.block) == (other.table_name, other.block)

    def __hash__(self) -> int:
        return hash((self.table_name, self.block))

    def __str__(self) -> str:
        return f"BlockSparse({self.table_name}, {self.block})"

    def tables(self) -> dict[str, torch.Tensor]:
        return {self.table_name: self.table}

    def bind(self, kv_len: int) -> Pattern:
        covered = min(self.table.shape[-2:]) * self.block
        if kv_len > covered:
            raise PatternError(
                f"{self}: its table of {list(self.table.shape)} blocks of {self.block} covers {covered} positions, "
                f"not {kv_len}; give a larger table"
            )
        return self

    @property
    def num_heads(self) -> int | None:
        return self.table.shape[0] if self.table.dim() == 3 else None

    def split_heads(self, num_heads: int) -> tuple[Pattern, ...]:
        if self.table.dim() == 2:
            return (self,) * num_heads
        layouts = len(self.table)
        if num_heads % layouts:
            raise PatternError(f"{self}: {num_heads} heads do not divide into {layouts} equal groups, one a layout")
        rules = [BlockSparse(layout, self.block) for layout in self.table]
        return tuple(rules[head * layouts // num_heads] for head in range(num_heads))

    def block_allows(self, q_block: torch.Tensor, kv_block: torch.Tensor) -> torch.Tensor:
        q_block = torch.as_tensor(q_block)
        return self.table.to(q_block.device)[..., q_block, kv_block]

    def block_pairs(self, q_len: int, kv_len: int) -> torch.Tensor:
        first, last = (kv_len - q_len) // self.block, -(-kv_len // self.block)
        pairs = self.table[first:last, :last].nonzero()
        pairs[:, 0] += first
        return pairs

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.block_allows(i // self.block, j // self.block)

    @property
    def is_causal(self) -> bool:
        return not bool(self.table.triu(1 if self.block == 1 else 0).any())

    def retained(self, next_position: int) -> torch.Tensor:
        covered = self.table.shape[-2] * self.block
        if len(cached(next_position)) >= covered:
            return torch.zeros(*self.table.shape[:-2], next_position, dtype=torch.bool)
        kept = self.table[..., next_position // self.block :, :].any(-2).repeat_interleave(self.block, -1)
        missing = max(0, next_position - kept.shape[-1])
        return torch.nn.functional.pad(kept, (0, missing))[..., :next_position]

    def terms(self) -> tuple[Term, ...]:
        if self.table.dim() == 3:
            raise PatternError(f"{self}: heads differ; take the rule of every head with split_heads(num_heads)")
        return (Term.of(BlockTable(self, self.block)),)
