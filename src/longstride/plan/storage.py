"""Which rows a cache keeps for a pattern: a few stores a head, each numbered by arithmetic.

A store keeps some positions, its *keys*. Those of a `KeyGroup` or `KeyList` count themselves 0, 1, 2, ..., and the
position with number n lies in row ``n % rows``. With as many rows as there are numbers it keeps all of them; with fewer
it is a ring that forgets the oldest. Blocks that a table lists are `Placed`: a block has rows from its first key on
until the last block of queries that lists it is over, then another block takes them.

| what a term of the pattern reads  | the positions kept              | rows                                   |
|-----------------------------------|---------------------------------|----------------------------------------|
| a window of w                     | every position                  | w, a ring                              |
| the query's own block             | every position                  | block, a ring                          |
| the summary of every block        | the group of every block        | all                                    |
| the summaries within a window     | the group of every block        | as many as a window holds, a ring      |
| listed keys                       | the list                        | all                                    |
| everything, in a listed query     | 0 .. the last listed query      | all, also once that query is over      |
| blocks of a table                 | blocks that are listed at all   | as many as are ever needed at a time   |
| a stride, powers, a rule of one's own | every position              | all                                    |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from longstride.patterns.regions import BlockTable, KeyGroup, KeyList, QueryList, Term

#: The longest capacity: positions and rows fit in 32-bit arithmetic with room for sums of two.
LONGEST = 1 << 30

#: Every position, as a group.
EVERY = KeyGroup(1, 0, 1)


@dataclass(frozen=True, eq=False)
class Placed:
    """Blocks of keys and the slots that they take in turn.

    Attributes:
        block: positions a block.
        slots: how many there are.
        slot: of every block, int64; -1 where it is never read.
        until: of every block, int64: the first position of the block that takes its slot next, or `LONGEST`.
        turn: the first position at which a block takes a slot that another one had, or `LONGEST`.
    """

    block: int
    slots: int
    slot: torch.Tensor
    until: torch.Tensor
    turn: int


Keys = KeyGroup | KeyList | Placed


@dataclass(frozen=True)
class Need:
    """What a cache must keep for one term: positions of `keys`, the latest `window` of all positions or all (None)."""

    keys: Keys
    window: int | None


@dataclass(frozen=True)
class Store:
    """Rows for the positions of `keys`."""

    keys: Keys
    rows: int

    def member(self, position: torch.Tensor) -> torch.Tensor:
        """True where the store ever keeps a position."""
        if self.keys == EVERY:
            return torch.ones_like(position, dtype=torch.bool)
        if isinstance(self.keys, Placed):
            return _on(self.keys, position.device)[0][position // self.keys.block] >= 0
        if isinstance(self.keys, KeyGroup):  # with less ado than `allows`, as each step asks
            place = position % self.keys.block
            return (place >= self.keys.start) & (place < self.keys.stop)
        return self.keys.allows(position, position)

    def row(self, position: torch.Tensor) -> torch.Tensor:
        """The row of a member."""
        if isinstance(self.keys, Placed):
            block = self.keys.block
            return _on(self.keys, position.device)[0][position // block] * block + position % block
        return self._before(position) % self.rows

    def latest(self, position: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """True where no later member before `end` has the same row."""
        if isinstance(self.keys, Placed):
            block = self.keys.block
            return _on(self.keys, position.device)[1][position // block] + position % block >= end
        return self._before(position) >= self._before(end) - self.rows

    def forgets(self, length: int) -> bool:
        """True when a row has been written twice by the time that there are `length` positions."""
        if isinstance(self.keys, Placed):
            return length > self.keys.turn
        return count(self.keys, length) > self.rows

    def _before(self, position: torch.Tensor) -> torch.Tensor:
        """How many of the store's positions lie before `position`."""
        assert not isinstance(self.keys, Placed)
        if isinstance(self.keys, KeyList):
            return torch.searchsorted(_tokens(self.keys.tokens, position.device), position.contiguous())
        return position if self.keys == EVERY else self.keys.count_before(position)


def need(term: Term, capacity: int, headroom: int) -> Need:
    """What must be kept for the queries of `term`, so that the latest headroom + 1 tokens can be taken back."""
    most = term.span.most
    window = None if most is None else most + 1 + headroom
    choices: list[Keys] = [EVERY]
    for region in term.regions:
        if isinstance(region, KeyGroup):
            choices.append(region)
        elif isinstance(region, KeyList):
            choices.append(_compact(region))
        elif isinstance(region, QueryList):
            choices.append(KeyGroup(LONGEST, 0, min(region.tokens[-1] + 1, LONGEST)))
        elif isinstance(region, BlockTable):
            choices.append(_placed(region, capacity, headroom))
    keys = min(choices, key=lambda keys: rows_for(Need(keys, window), capacity))
    return Need(keys, window)


def choose_stores(needs: Iterable[Need], capacity: int) -> tuple[Store, ...]:
    """The stores of one head of keys: every need is covered by one of them, and none covers another."""
    kept: list[Store] = []
    for each in sorted(needs, key=lambda each: rows_for(each, capacity), reverse=True):
        if not any(covers(store, each, capacity) for store in kept):
            kept.append(Store(each.keys, rows_for(each, capacity)))
    return (Store(EVERY, capacity),) if sum(store.rows for store in kept) >= capacity else tuple(kept)


def covers(store: Store, need: Need, capacity: int) -> bool:
    """True when the store keeps all that is needed."""
    return _within(need.keys, store.keys) and store.rows >= rows_for(Need(store.keys, need.window), capacity)


def rows_for(need: Need, capacity: int) -> int:
    """The fewest rows that keep what is needed up to `capacity` positions."""
    if isinstance(need.keys, Placed):
        return need.keys.slots * need.keys.block
    total = count(need.keys, capacity)
    if need.window is None or isinstance(need.keys, KeyList):
        return total
    blocks, rest = divmod(need.window, need.keys.block)
    width = need.keys.stop - need.keys.start
    return min(total, blocks * width + min(width, rest))


def count(keys: KeyGroup | KeyList, position: int) -> int:
    """How many of `keys` lie before `position`."""
    if isinstance(keys, KeyList):
        return sum(token < position for token in keys.tokens)
    width = keys.stop - keys.start
    return position // keys.block * width + min(max(position % keys.block - keys.start, 0), width)


def _compact(keys: KeyList) -> Keys:
    """The first n positions are a group of one huge block, whose numbers need no search."""
    first = keys.tokens == tuple(range(len(keys.tokens)))
    return KeyGroup(LONGEST, 0, len(keys.tokens)) if first else keys


def _within(keys: Keys, others: Keys) -> bool:
    """True when every one of `keys` is seen to be one of `others`."""
    if others in (EVERY, keys):
        return True
    if isinstance(keys, Placed) or isinstance(others, Placed):
        return False
    if isinstance(others, KeyList):
        return isinstance(keys, KeyList) and set(keys.tokens) <= set(others.tokens)
    if isinstance(keys, KeyList):
        return all(others.start <= token % others.block < others.stop for token in keys.tokens)
    return keys.block == others.block and others.start <= keys.start and keys.stop <= others.stop


@lru_cache(maxsize=256)
def _placed(table: BlockTable, capacity: int, headroom: int) -> Placed:
    """Slots for the blocks of keys that blocks of queries list: the first that is free, as a block begins."""
    blocks = -(-capacity // table.block)
    pairs = table.blocks(capacity, capacity)
    pairs = pairs[pairs[:, 0] >= pairs[:, 1]]
    last = torch.full((blocks,), -1).scatter_reduce(0, pairs[:, 1], pairs[:, 0], "amax").tolist()
    again = -(-headroom // table.block)  # blocks that a crop may go back
    slot, until, turn = [-1] * blocks, [LONGEST] * blocks, LONGEST
    holders: list[int] = []  # the block that each slot has
    for block in range(blocks):
        if last[block] < 0:
            continue
        free = next((s for s, holder in enumerate(holders) if last[holder] + again < block), None)
        if free is None:
            free = len(holders)
            holders.append(block)
        else:
            until[holders[free]] = block * table.block
            turn = min(turn, block * table.block)
            holders[free] = block
        slot[block] = free
    return Placed(table.block, len(holders), torch.tensor(slot), torch.tensor(until), turn)


@lru_cache(maxsize=256)
def _on(keys: Placed, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return keys.slot.to(device), keys.until.to(device)


@lru_cache(maxsize=256)
def _tokens(tokens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(tokens, device=device)
