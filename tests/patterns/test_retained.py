"""`retained` and `is_causal`: what a cache may forget, and whether it may work at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import assert_keeps_what_is_read
from tests.strategies import ATOMS, Thirds, joined, per_head_mixes

import longstride as ls

NOW = st.integers(0, 30)


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_an_atom_keeps_exactly_what_is_still_read(pattern):
    # A block table ends somewhere; the others are looked at until the farthest of their keys is read again.
    later = 64 if isinstance(pattern, ls.BlockSparse) else 256
    # A random draw is not foreseen, and of a user's own rule nothing is known.
    exactly = not isinstance(pattern, ls.RandomBlocks | Thirds)
    for now in range(40):
        assert_keeps_what_is_read(pattern, now, later, exactly)


@settings(max_examples=150)
@given(joined() | per_head_mixes(), NOW)
def test_no_expression_drops_a_key_that_is_still_read(pattern, now):
    assert_keeps_what_is_read(pattern, now, 64)


@settings(max_examples=60)
@given(joined(2), joined(2), NOW)
def test_a_union_keeps_what_either_member_keeps(left, right, now):
    assert torch.equal((left | right).retained(now), left.retained(now) | right.retained(now))


def test_members_with_different_numbers_of_heads_are_kept_head_by_head():
    pattern = ls.per_head(ls.Local(3), ls.Local(5)) | ls.per_head(ls.Local(2), ls.Local(9), ls.Full(), ls.Local(1))
    assert pattern.retained(20).shape == (4, 20)
    assert_keeps_what_is_read(pattern, 20, 64)
    three = ls.per_head(ls.Local(3), ls.Local(5)) | ls.per_head(ls.Local(2), ls.Local(9), ls.Summary(4, 1))
    assert three.retained(20).shape == (6, 20)


def test_a_window_keeps_one_key_less_than_it_reads():
    assert ls.Local(4).retained(10).nonzero().flatten().tolist() == [7, 8, 9]
    assert not ls.Local(1).retained(10).any()


def test_the_summary_and_the_present_block_are_all_that_fixed_attention_keeps():
    assert ls.Fixed(4, 1).retained(10).nonzero().flatten().tolist() == [3, 7, 8, 9]


def test_heads_are_kept_apart():
    kept = ls.per_head(ls.Local(2), ls.Strided(4)).retained(6)
    assert kept.tolist() == [[False] * 5 + [True], [True] * 6]


def test_a_position_before_the_first_is_an_error():
    for pattern in (ls.Local(4), ls.Fixed(4, 1), ls.Global(2), Thirds()):
        with pytest.raises(ls.PatternError, match="next_position=-1"):
            pattern.retained(-1)


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_an_atom_knows_whether_it_is_causal(pattern):
    assert pattern.is_causal == (not pattern.mask(64).triu(1).any())


@settings(max_examples=100)
@given(joined() | per_head_mixes())
def test_a_pattern_that_says_it_is_causal_is(pattern):
    assert not (pattern.is_causal and pattern.mask(64).triu(1).any())


@settings(max_examples=60)
@given(joined(1), joined(1))
def test_a_union_is_causal_when_all_of_it_is(left, right):
    assert (left | right).is_causal == (left.is_causal and right.is_causal)


@pytest.mark.parametrize(
    ("text", "causal"),
    [
        ("Local(4)", True),
        ("Local(4, lookahead=1)", False),
        ("Dilated(2, 3, lookahead=1)", False),
        ("Full()", False),
        ("Full() & Causal()", True),
        ("Local(4) | Full()", False),
        ("Strided(4, causal=False)", False),
        ("per_head(Local(4), Strided(3))", True),
        ("per_head(Local(4), Full())", False),
        ("per_head(Local(4), Full()) & Causal()", True),
        ("BlockLocal(1, causal=False)", True),
    ],
)
def test_causality_of_expressions(text, causal):
    assert ls.parse(text).is_causal is causal


def test_a_triangle_of_blocks_is_causal_only_without_its_diagonal():
    below = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    assert ls.BlockSparse(below, 8).is_causal
    assert not ls.BlockSparse(below | torch.eye(4, dtype=torch.bool), 8).is_causal
    assert ls.BlockSparse(below | torch.eye(4, dtype=torch.bool), 1).is_causal
    assert (ls.BlockSparse(below | torch.eye(4, dtype=torch.bool), 8) & ls.Causal()).is_causal
