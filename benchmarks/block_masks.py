"""FlexAttention's rules and block masks for the patterns timed here, at any length.

`create_block_mask` evaluates a rule on every pair of positions at once, which is out of memory at 65,536. Here a row of
blocks is evaluated at a time, and where a rule depends on the distance alone, one row says it all. The rules are
written by hand, as a user of FlexAttention would, so that they check ours and are no slower than need be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch.nn.attention.flex_attention import BlockMask

import longstride as ls

BLOCK = 128

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FlexRule:
    """A `mask_mod` (batch, head, query, key) -> bool.

    Attributes:
        by_distance: it is causal and looks at query - key alone.
        heads: how many heads it tells apart.
    """

    mask_mod: MaskMod
    by_distance: bool
    heads: int = 1


def rule_of(pattern: ls.Pattern, heads: int, length: int, device: str) -> FlexRule:
    """The rule of a pattern; ValueError for one that is not written here."""
    if members := getattr(pattern, "patterns", ()):
        rules = [rule_of(member, heads, length, device) for member in members]
        joined = reduce(_either, (rule.mask_mod for rule in rules))
        return FlexRule(joined, all(rule.by_distance for rule in rules), max(rule.heads for rule in rules))
    if isinstance(pattern, ls.Local):
        return _local(pattern.window, pattern.lookahead)
    if isinstance(pattern, ls.Strided) and pattern.causal:
        stride = pattern.stride
        return FlexRule(lambda _b, _h, i, j: (i >= j) & ((i - j) % stride == 0), by_distance=True)
    if isinstance(pattern, ls.Fixed):
        return _fixed(pattern.block, pattern.summary, pattern.offset)
    if isinstance(pattern, ls.LogSparse) and pattern.base == 2 and pattern.causal:
        return FlexRule(lambda _b, _h, i, j: (i >= j) & (((i - j) & (i - j - 1)) == 0), by_distance=True)
    if isinstance(pattern, ls.Global) and isinstance(pattern.tokens, int) and not pattern.causal:
        tokens = pattern.tokens
        return FlexRule(lambda _b, _h, i, j: (i < tokens) | (j < tokens), by_distance=False)
    if isinstance(pattern, ls.RandomBlocks) and not pattern.causal:
        return _random_blocks(pattern, heads, length, device)
    raise ValueError(f"no FlexAttention rule is written for {pattern}")


def _either(a: MaskMod, b: MaskMod) -> MaskMod:
    return lambda batch, head, i, j: a(batch, head, i, j) | b(batch, head, i, j)


def _local(window: int, lookahead: int) -> FlexRule:
    if lookahead:
        return FlexRule(lambda _b, _h, i, j: (i - j < window) & (j - i <= lookahead), by_distance=False)
    return FlexRule(lambda _b, _h, i, j: (i >= j) & (i - j < window), by_distance=True)


def _fixed(block: int, summary: int, offset: int) -> FlexRule:
    first, last = block - offset - summary, block - offset

    def mask_mod(_batch: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        place = j % block
        return (i >= j) & ((i // block == j // block) | ((place >= first) & (place < last)))

    return FlexRule(mask_mod, by_distance=False)


def _random_blocks(pattern: ls.RandomBlocks, heads: int, length: int, device: str) -> FlexRule:
    """The draws as a table, since drawing again for every pair would be slow."""
    block = pattern.block
    blocks = torch.arange(-(-length // block), device=device)
    rules = [rule.bind(length) for rule in pattern.split_heads(heads)]
    table = torch.stack([rule.block_allows(blocks[:, None], blocks[None]) for rule in rules])
    return FlexRule(lambda _b, head, i, j: table[head, i // block, j // block], by_distance=False, heads=heads)


def block_mask(rule: FlexRule, length: int, device: str, block: int = BLOCK) -> BlockMask:
    """What `create_block_mask` would give, without evaluating all pairs at once."""
    if length % block:
        raise ValueError(f"length {length} is no multiple of {block}")
    some, every = (_by_distance if rule.by_distance else _by_rows)(rule, length, device, block)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=block, mask_mod=rule.mask_mod
    )


def _row_of_blocks(
    rule: FlexRule, first: int, length: int, device: str, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the queries first .. first + block - 1: which key blocks hold some allowed pair, and which hold all.

    Returns:
        bool [heads, length // block] each.
    """
    head = torch.arange(rule.heads, device=device)[:, None, None]
    i = torch.arange(first, first + block, device=device)[None, :, None]
    j = torch.arange(length, device=device)[None, None]
    allowed = rule.mask_mod(torch.zeros_like(head), head, i, j).expand(rule.heads, block, length)
    tiles = allowed.view(rule.heads, block, length // block, block)
    return tiles.any(3).any(1), tiles.all(3).all(1)


def _by_rows(rule: FlexRule, length: int, device: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [_row_of_blocks(rule, first, length, device, block) for first in range(0, length, block)]
    some, every = (torch.stack(found, 1) for found in zip(*rows, strict=True))
    return some[None], every[None]


def _by_distance(rule: FlexRule, length: int, device: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last row of blocks has every distance between blocks: entry d of its reverse is distance d."""
    blocks = torch.arange(length // block, device=device)
    distance = blocks[:, None] - blocks[None]
    some, every = (
        torch.where(distance >= 0, row[0].flip(0)[distance.clamp(min=0)], False)[None, None]
        for row in _row_of_blocks(rule, length - block, length, device, block)
    )
    return some, every


def _ordered(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row of a bool table has, and which: theirs first, in ascending order."""
    order = table.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.to(torch.int32)
