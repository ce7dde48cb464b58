"""`PatternCache`: keys and values of the tokens that some later query may still read, and of no others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longstride.errors import ArgumentError
from longstride.patterns import Pattern
from longstride.plan import Layout, layout


@dataclass
class Step:
    """Tokens that the layers are being given, between two calls of `PatternCache.advance`.

    Attributes:
        tokens: how many a row, at most.
        counts: int64 [batch], how many each row has; None where all have `tokens`.
        most: the greatest of `counts`.
        shortest, longest: bounds of the rows' lengths when the step is over.
        fed: the layers that have them already.
        shared: what backends work out once for all layers.
    """

    tokens: int
    counts: torch.Tensor | None
    most: int
    shortest: int
    longest: int
    fed: set[int] = field(default_factory=set)
    shared: dict[Hashable, Any] = field(default_factory=dict)


class PatternCache:
    """The keys and values of a batch of growing sequences, as far as the patterns of the layers still read them.

    A window keeps its latest keys in a ring, `Fixed` its present block and the summaries, a stride everything. All
    memory is taken at once, and `cache_bytes` says beforehand how much. `longstride.attention_cached` reads and fills
    it, layer by layer; `advance` then moves on:

    >>> import torch, longstride as ls
    >>> pattern = ls.Local(8) | ls.Summary(8, 1)
    >>> cache = ls.PatternCache(pattern, capacity=100, num_heads=2, head_dim=16)
    >>> for tokens in (40, 1, 1):  # a prompt, then token by token
    ...     q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    ...     out = ls.attention_cached(q, k, v, pattern, cache)
    ...     cache.advance()
    >>> cache.longest
    42

    Rows of the batch may have different lengths; each counts its positions from its own first token.

    Args:
        patterns: one a layer, each causal; a single one for a single layer.
        capacity: the most tokens of a row.
        batch: rows.
        num_heads: query heads.
        head_dim: width of a head's keys.
        num_kv_heads: heads of keys and values; num_heads when not given.
        v_head_dim: width of a head's values; head_dim when not given.
        headroom: up to headroom + 1 tokens are decoded in place, and can be taken back by `crop` at any time, as
            speculative decoding does. Every ring has so many more rows.
        dtype, device: of keys and values; PyTorch's defaults when not given.

    Raises:
        ArgumentError: sizes that do not fit together.
        PatternError: a pattern is not causal, does not split over the heads or does not cover the capacity.
    """

    def __init__(
        self,
        patterns: Pattern | Sequence[Pattern],
        *,
        capacity: int,
        num_heads: int,
        head_dim: int,
        batch: int = 1,
        num_kv_heads: int | None = None,
        v_head_dim: int | None = None,
        headroom: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.layouts = layouts_of(patterns, capacity, num_heads, num_kv_heads, headroom)
        self.capacity, self.headroom = capacity, headroom
        shapes = shapes_of(self.layouts, batch, head_dim, v_head_dim)
        # Zeros, since a row that is not read still meets a weight of zero.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for shape in each] for each in zip(*shapes, strict=True)
        )
        #: int64 [batch]: the tokens of each row.
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.keys[0].device)
        #: int32: see `CachedRows.arrivals`; layers take turns with it.
        self.arrivals = torch.zeros(arrivals_of(self.layouts, batch), dtype=torch.int32, device=self.keys[0].device)
        #: Bounds of `lengths` that need no look at the device; equal where all rows are equally long.
        self.shortest = self.longest = 0
        self._taken_back = 0
        self._step: Step | None = None

    # ---- what it is -----------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds."""
        return sum(x.untyped_storage().nbytes() for x in (*self.keys, *self.values, self.lengths, self.arrivals))

    def __repr__(self) -> str:
        return (
            f"<PatternCache: {len(self.layouts)} layers, {self.batch} rows of at most {self.capacity} tokens, "
            f"{self.longest} there, {self.nbytes:,} bytes>"
        )

    # ---- a step ---------------------------------------------------------------------------------------------------

    def feed(self, layer: int, tokens: int, counts: torch.Tensor | None) -> Step:
        """Begin a step with its first layer, or go on with the next one; `attention_cached` calls it."""
        if not 0 <= layer < len(self.layouts):
            raise ArgumentError(f"layer {layer}: this cache has layers 0 .. {len(self.layouts) - 1}")
        step = self._step
        if step is None:
            step = self._begin(tokens, counts)
        elif step.tokens != tokens or (step.counts is None) != (counts is None):
            raise ArgumentError(
                f"layer {layer} is given {tokens} tokens in a step of {step.tokens}: all layers take the same tokens, "
                "then advance() ends the step"
            )
        if layer in step.fed:
            raise ArgumentError(
                f"layer {layer} is given tokens twice in one step: call advance() when every layer has had them"
            )
        step.fed.add(layer)
        self._step = step
        return step

    def _begin(self, tokens: int, counts: torch.Tensor | None) -> Step:
        most, shortest, longest = tokens, self.shortest + tokens, self.longest + tokens
        if counts is not None:
            if counts.shape != (self.batch,) or counts.dtype != torch.int64:
                raise ArgumentError(
                    f"counts is {counts.dtype} {list(counts.shape)}: it must be int64 [batch] = [{self.batch}], the "
                    "tokens that each row really has"
                )
            fewest, most = (int(x) for x in counts.aminmax())
            if not 0 <= fewest <= most <= tokens:
                raise ArgumentError(f"counts run from {fewest} to {most}: each must be from 0 to the {tokens} given")
            shortest, longest = (int(x) for x in (self.lengths + counts).aminmax())
        self._check_room(longest)
        return Step(tokens, counts, most, shortest, longest)

    def _check_room(self, longest: int) -> None:
        if longest > self.capacity:
            raise ArgumentError(
                f"{self.longest} tokens and {longest - self.longest} more: this cache has room for {self.capacity}; "
                f"make one with a capacity of at least {longest}"
            )

    def abandon(self) -> None:
        """Drop a step in which no layer was given its tokens in the end."""
        self._step = None

    def advance(self) -> None:
        """Count the tokens that every layer was given: what is given next comes after them.

        Raises:
            ArgumentError: not every layer was given them.
        """
        step = self._step
        if step is None or len(step.fed) < len(self.layouts):
            missing = sorted(set(range(len(self.layouts))) - (step.fed if step else set()))
            raise ArgumentError(
                f"advance() before layers {', '.join(map(str, missing))} were given tokens: call attention_cached for "
                "every layer first"
            )
        self.lengths += step.tokens if step.counts is None else step.counts
        self._taken_back = max(0, self._taken_back - (step.tokens if step.counts is None else 0))
        self.shortest, self.longest = step.shortest, step.longest
        self._step = None

    def passed(self, tokens: int) -> None:
        """Note that every row has grown by `tokens` on the device, as the replay of a CUDA graph makes it.

        A capture counts its tokens on the host alone: a negative number takes that back.
        """
        self._check_room(self.longest + tokens)
        self._taken_back = max(0, self._taken_back - tokens)
        self.shortest += tokens
        self.longest += tokens

    # ---- rows of the batch ----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens; the memory is used again."""
        self.lengths.zero_()
        self.shortest = self.longest = self._taken_back = 0
        self._step = None

    def crop(self, tokens: int) -> None:
        """Take back the latest `tokens` tokens of every row.

        Raises:
            ArgumentError: there are fewer, or keys that would be read again were evicted.
        """
        self._between_steps("crop")
        if not 0 <= tokens <= self.shortest:
            raise ArgumentError(f"crop({tokens}): from 0 to {self.shortest} tokens can be taken back")
        if tokens == self.longest:
            self.reset()
            return
        taken = self._taken_back + tokens
        # The row that a token takes is one that no query at its position or after it reads.
        allowed = self.headroom + 1
        if taken > allowed and (evicting := self._evicting()):
            raise ArgumentError(
                f"crop({tokens}): {evicting.pattern} would read keys again that were evicted when later ones came; "
                f"at most {max(0, allowed - self._taken_back)} tokens can be taken back now, or all of them; make the "
                f"cache with headroom={taken - 1}"
            )
        self._taken_back = taken
        self.lengths -= tokens
        self.shortest -= tokens
        self.longest -= tokens

    def _evicting(self) -> Layout | None:
        """A layout that has forgotten a key."""
        ever = self.longest + self._taken_back
        for made in dict.fromkeys(self.layouts):
            if any(store.forgets(ever) for store in made.stores):
                return made
        return None

    def select(self, rows: torch.Tensor) -> None:
        """Row n becomes a copy of row ``rows[n]``, int64 [new batch]: beams that change places, or a smaller batch."""
        self._between_steps("select")
        rows = rows.to(self.device)
        self.keys = [_selected(x, rows) for x in self.keys]
        self.values = [_selected(x, rows) for x in self.values]
        self.lengths = _selected(self.lengths, rows)
        if len(self.arrivals) != (needed := arrivals_of(self.layouts, self.batch)):
            self.arrivals = self.arrivals.new_zeros(needed)
        if self.shortest != self.longest:
            self.shortest, self.longest = (int(x) for x in self.lengths.aminmax())

    def repeat(self, copies: int) -> None:
        """Every row becomes `copies` neighbouring rows: one prompt, computed once, for several samples."""
        if copies < 1:
            raise ArgumentError(f"repeat({copies}): it must be at least 1")
        self.select(torch.arange(self.batch, device=self.device).repeat_interleave(copies))

    def _between_steps(self, what: str) -> None:
        if self._step is not None:
            raise ArgumentError(f"{what}() within a step: call advance() first, when every layer has had its tokens")


def _selected(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows], in place where it fits: what has been recorded with this memory goes on working."""
    new = x.index_select(0, rows)
    return x.copy_(new) if len(new) == len(x) else new


def cache_bytes(
    patterns: Pattern | Sequence[Pattern],
    capacity: int,
    *,
    num_heads: int,
    head_dim: int,
    batch: int = 1,
    num_kv_heads: int | None = None,
    v_head_dim: int | None = None,
    headroom: int = 0,
    dtype: torch.dtype | None = None,
) -> int:
    """The bytes that a `PatternCache` of these arguments takes, exactly, without making it.

    >>> import longstride as ls
    >>> sizes = {"num_heads": 8, "head_dim": 64}
    >>> ls.cache_bytes(ls.Fixed(128, 8), 65536, **sizes) / ls.cache_bytes(ls.Causal(), 65536, **sizes) < 0.07
    True

    Args:
        patterns, capacity, ...: as in `PatternCache`.

    Raises:
        ArgumentError, PatternError: as `PatternCache` does.
    """
    layouts = layouts_of(patterns, capacity, num_heads, num_kv_heads, headroom)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    elements = sum(
        rows * width * size for pair in shapes_of(layouts, batch, head_dim, v_head_dim) for size, rows, width in pair
    )
    beside = batch * torch.int64.itemsize + arrivals_of(layouts, batch) * torch.int32.itemsize
    return elements * dtype.itemsize + beside


def layouts_of(
    patterns: Pattern | Sequence[Pattern], capacity: int, num_heads: int, num_kv_heads: int | None, headroom: int
) -> tuple[Layout, ...]:
    """One layout a layer; equal ones are one value."""
    listed = [patterns] if isinstance(patterns, Pattern) else list(patterns)
    if not listed:
        raise ArgumentError("a cache of no layers: give at least one pattern")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    return tuple(layout(pattern, capacity, num_heads, kv_heads, headroom) for pattern in listed)


def arrivals_of(layouts: Sequence[Layout], batch: int) -> int:
    """The numbers of `CachedRows.arrivals`: heads, headroom and batch are the same for all layers."""
    return batch * (layouts[0].headroom + 1) * layouts[0].num_heads


def shapes_of(
    layouts: Sequence[Layout], batch: int, head_dim: int, v_head_dim: int | None
) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """The shapes of each layer's keys and values."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    for name, value in (("batch", batch), ("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}={value!r}: it must be a whole number of at least 1")
    return [((batch, made.rows, head_dim), (batch, made.rows, v_head_dim)) for made in layouts]
