"""`pairs` and `density`: exact, in closed form, at any length."""

import time

import pytest
from hypothesis import given, settings
from tests.oracle import assert_counts_its_pairs
from tests.strategies import ATOMS, joined, lengths, patterns, union

import longstride as ls

LENGTHS = ((1, 1), (3, 3), (37, 37), (64, 64), (1, 33), (7, 40))
T = 2**20


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_pairs_of_an_atom_are_those_of_its_mask(pattern):
    for size in LENGTHS:
        assert_counts_its_pairs(pattern, *size)


@pytest.mark.parametrize("left", ATOMS, ids=str)
def test_pairs_of_two_atoms_are_those_of_the_mask(left):
    for right in ATOMS:
        for pattern in (left | right, left & right):
            for size in ((37, 37), (1, 33), (7, 40)):
                assert_counts_its_pairs(pattern, *size)


@settings(max_examples=200)
@given(joined(5), lengths())
def test_pairs_of_any_expression_are_those_of_its_mask(pattern, size):
    assert_counts_its_pairs(pattern, *size)


@settings(max_examples=60)
@given(patterns(), lengths())
def test_pairs_of_heads_are_summed(pattern, size):
    assert_counts_its_pairs(pattern, *size, heads=4)


@settings(max_examples=40)
@given(patterns())
def test_density_is_the_allowed_share(pattern):
    assert pattern.density(30) == pytest.approx(pattern.mask(30).float().mean().item(), rel=1e-6)


LONG = [
    (ls.Causal(), T * (T + 1) // 2),
    (ls.Full(), T * T),
    (ls.Local(1024), 1024 * T - 1024 * 1023 // 2),
    (ls.Local(1025, lookahead=1024), 2049 * T - 1024 * 1025),
    (ls.Strided(1024), 1024 * (1024 * 1025 // 2)),
    (ls.Strided(1024, causal=False), T * 1024),
    (ls.Dilated(64, 8), 8 * sum(min(row + 1, 64) for row in range(T // 8))),
    (ls.BlockLocal(1024), 1024 * (1024 * 1025 // 2)),
    (ls.Fixed(1024, 32), 1024 * (1024 * 1025 // 2) + 32 * 1024 * (1024 * 1023 // 2)),
    (ls.Summary(1024, 32), 1024 * (32 * 33 // 2) + 32 * 1024 * (1024 * 1023 // 2)),
    (ls.LogSparse(), T + sum(T - 2**power for power in range(20))),
    (ls.Global(64), 64 * 65 // 2 + (T - 64) * 64),
    (ls.Global(64, causal=False), 2 * 64 * T - 64 * 64),
    (ls.Local(1), T),
    # The distance 0 of the strides lies in the window.
    (ls.Local(1024) | ls.Strided(1024), 1024 * T - 1024 * 1023 // 2 + 1024 * (1024 * 1025 // 2) - T),
    (ls.Local(1024) & ls.Strided(1000), T + T - 1000),
    (ls.Local(512) & ls.BlockLocal(1024), 1024 * (512 * 1024 - 512 * 511 // 2)),
]


@pytest.mark.parametrize(("pattern", "pairs"), LONG, ids=str)
def test_a_million_positions_are_counted_exactly_and_at_once(pattern, pairs):
    assert pattern.pairs(T) == pairs
    assert _best_seconds(pattern) < 0.5


@pytest.mark.parametrize(
    "pattern",
    [
        ls.bigbird(64),
        ls.longformer(512, 16),
        union(ls.Local(1024), ls.Strided(1024), ls.Fixed(1024, 32), ls.Global(64), ls.Dilated(64, 8)),
        (ls.Local(2048) | ls.Strided(512)) & (ls.Fixed(1024, 32) | ls.LogSparse()),
    ],
    ids=str,
)
def test_joined_patterns_are_counted_at_once_too(pattern):
    assert 0 < pattern.pairs(T) < T * T
    assert _best_seconds(pattern) < 0.5


def test_one_new_query_is_counted_against_a_million_keys():
    assert (ls.Local(1024) | ls.Strided(1024)).pairs(1, T) == 1024 + T // 1024 - 1


def _best_seconds(pattern: ls.Pattern) -> float:
    """The best of a few, in time of this thread: the machine may be busy with something else."""
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        pattern.pairs(T)
        seconds.append(time.thread_time() - start)
    return min(seconds)
