"""Hypothesis strategies for the core: atoms, unions, intersections, per-head mixes, lengths."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import longstride as ls

#: Lengths that the strategies draw never pass this, so that a block table can cover them.
LONGEST = 48


@dataclass(frozen=True, repr=False)
class Thirds(ls.Pattern):
    """A user's own rule, of which the package knows nothing: every third key back, and one key that all may read."""

    shared: int = 5

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ((i - j) % 3 == 0) & (j <= i) | (j == self.shared)


def random_table(seed: int, block: int, *heads: int, length: int = 64) -> torch.Tensor:
    """bool [*heads, n, n] with n blocks that cover `length`."""
    blocks = -(-length // block)
    return torch.rand(*heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) > 0.6


#: One or more of every pattern, with sizes that divide none of the usual test lengths.
ATOMS: tuple[ls.Pattern, ...] = (
    ls.Causal(),
    ls.Full(),
    ls.Local(5),
    ls.Local(4, lookahead=3),
    ls.Local(30),
    ls.Local(1, lookahead=2),
    ls.Dilated(3, 4),
    ls.Dilated(2, 3, lookahead=2),
    ls.Strided(5),
    ls.Strided(4, causal=False),
    ls.Strided(70),
    ls.BlockLocal(6),
    ls.BlockLocal(4, causal=False),
    ls.Summary(6, 2),
    ls.Summary(5, 2, 1),
    ls.Summary(4, 1, 3),
    ls.Fixed(8, 2),
    ls.LogSparse(),
    ls.LogSparse(3, causal=False),
    ls.Global(3),
    ls.Global((2, 7, 11), causal=False),
    ls.RandomBlocks(4, 2),
    ls.RandomBlocks(4, 2, causal=False, seed=3),
    ls.BlockSparse(random_table(0, 4), 4),
    Thirds(),
)


@st.composite
def _summaries(draw: st.DrawFn) -> ls.Pattern:
    block = draw(st.integers(1, 10))
    count = draw(st.integers(1, block))
    offset = draw(st.integers(0, block - count))
    return draw(st.sampled_from([ls.Summary, ls.Fixed]))(block, count, offset)


_tokens = st.integers(1, 6) | st.sets(st.integers(0, LONGEST), min_size=1, max_size=4).map(tuple)

_ATOMS = (
    st.builds(ls.Causal),
    st.builds(ls.Full),
    st.builds(ls.Local, st.integers(1, 24), st.integers(0, 6)),
    st.builds(ls.Dilated, st.integers(1, 8), st.integers(1, 7), st.integers(0, 3)),
    st.builds(ls.Strided, st.integers(1, 12), st.booleans()),
    st.builds(ls.BlockLocal, st.integers(1, 12), st.booleans()),
    _summaries(),
    st.builds(ls.LogSparse, st.integers(2, 5), st.booleans()),
    st.builds(ls.Global, _tokens, st.booleans()),
    st.builds(ls.RandomBlocks, st.integers(1, 8), st.integers(1, 3), st.integers(0, 9), st.booleans()),
    st.builds(
        lambda seed, block: ls.BlockSparse(random_table(seed, block), block), st.integers(0, 9), st.integers(2, 9)
    ),
    st.builds(Thirds, st.integers(0, 9)),
)


def atoms() -> st.SearchStrategy[ls.Pattern]:
    """One pattern without operators."""
    return st.one_of(*_ATOMS)


def joined(most: int = 4) -> st.SearchStrategy[ls.Pattern]:
    """Atoms joined by | and &, nested either way; one rule for every head."""
    return st.recursive(
        atoms(),
        lambda inner: st.builds(operator.or_, inner, inner) | st.builds(operator.and_, inner, inner),
        max_leaves=most,
    )


def per_head_mixes(most: int = 2) -> st.SearchStrategy[ls.Pattern]:
    """`per_head` of one, two or four patterns, alone or joined with a rule for all heads; heads is a multiple of 4."""
    lists = st.sampled_from([1, 2, 4]).flatmap(lambda n: st.lists(joined(most), min_size=n, max_size=n))
    mixes = lists.map(lambda members: ls.per_head(*members))
    layouts = st.builds(
        lambda seed, block: ls.BlockSparse(random_table(seed, block, 2), block), st.integers(0, 9), st.integers(2, 9)
    )
    either = mixes | layouts
    return either | st.builds(operator.or_, either, atoms()) | st.builds(operator.and_, either, atoms())


def patterns() -> st.SearchStrategy[ls.Pattern]:
    """Anything that four heads can use."""
    return joined() | per_head_mixes()


@st.composite
def lengths(draw: st.DrawFn, longest: int = LONGEST) -> tuple[int, int]:
    """(q_len, kv_len), ragged, often with fewer queries than keys, decode (one query) among them."""
    kv_len = draw(st.integers(1, longest))
    q_len = draw(st.one_of(st.just(kv_len), st.just(1), st.integers(1, kv_len)))
    return q_len, kv_len


def union(*members: ls.Pattern) -> ls.Pattern:
    return functools.reduce(operator.or_, members)
