"""What a cache keeps: all that a later query reads, little that none does, each token where it is looked for."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.strategies import LONGEST, Thirds, patterns, random_table

import longstride as ls
from longstride.plan import Layout, layout
from longstride.plan.layout import BLANK, SPARE_ROWS, SPILL

HEADS = 4


def causal(pattern: ls.Pattern) -> ls.Pattern:
    """The pattern with its later keys cut off; draws that depend on the length are none of a cache's."""
    made = pattern if pattern.is_causal else pattern & ls.Causal()
    assume(made.bind(LONGEST) == made)
    return made


def held(made: Layout, length: int) -> torch.Tensor:
    """bool [kv_heads, length]: the keys that are held after `length` tokens."""
    return made.held_rows(length, torch.tensor([length]))[0] != BLANK


def read_later(pattern: ls.Pattern, made: Layout, length: int) -> torch.Tensor:
    """bool [kv_heads, length]: the keys that a query at or after `length` reads, by the definition."""
    mask = pattern.mask(made.capacity, heads=made.num_heads)[:, length:, :length].any(1)
    return mask.unflatten(0, (made.num_kv_heads, -1)).any(1)


@settings(max_examples=150)
@given(patterns(), st.sampled_from([1, 2, 4]), st.integers(0, 5), st.integers(1, LONGEST))
def test_no_key_is_dropped_that_a_later_query_reads(pattern, kv_heads, headroom, length):
    pattern = causal(pattern)
    made = layout(pattern, LONGEST, HEADS, kv_heads, headroom)
    kept = held(made, length)
    for start in range(max(1, length - headroom - 1), length + 1):  # also after a crop by up to headroom + 1 tokens
        lost = read_later(pattern, made, start) & ~kept[:, :start]
        assert not lost.any(), f"{pattern} at {length}, back at {start}: {lost.nonzero().tolist()}"


#: (pattern, for how many tokens it may keep a key that nobody reads any more)
KEPT = [
    (ls.Local(5), 1),
    (ls.Local(1), 1),
    (ls.Dilated(3, 4), 1),
    (ls.BlockLocal(6), 6),
    (ls.Summary(6, 2), 1),
    (ls.Summary(6, 2) & ls.Local(20), 6),
    (ls.Fixed(8, 2), 8),
    (ls.Fixed(8, 2, 3), 8),
    (ls.Global(3), 1),
    (ls.Local(5) | ls.Global((2, 40)) & ls.Local(30), 39),
    (ls.Fixed(8, 2) | ls.Local(20), 1),
    (ls.Dilated(3, 4) | ls.Local(7) | ls.Global(2), 1),
    (ls.per_head(ls.Local(4), ls.Fixed(8, 1)), 8),
    (ls.BlockSparse(random_table(3, 4, length=200), 4) & ls.Causal(), 4),
    (ls.BlockSparse(torch.eye(50, dtype=torch.bool), 4) & ls.Causal(), 4),
]


@pytest.mark.parametrize(("pattern", "block"), KEPT, ids=str)
def test_no_key_is_kept_past_one_block(pattern, block):
    made = layout(pattern, 200, HEADS, HEADS)
    for length in range(1, 150):
        kept, before = held(made, length), max(0, length - block)
        wanted = pattern.retained(before) if pattern.num_heads is None else pattern.retained(before)[[0, 0, 1, 1]]
        assert not (kept[:, :before] & ~wanted).any(), f"{pattern} at {length}"


def test_a_listed_query_s_keys_are_the_exception():
    made = layout(ls.Global((2, 30)), 200, 1, 1)
    assert held(made, 100)[0].nonzero().flatten().tolist() == list(range(31))


@settings(max_examples=100)
@given(patterns(), st.sampled_from([1, 2, 4]), st.integers(0, LONGEST - 1))
def test_a_query_reads_its_keys_and_each_once(pattern, kv_heads, position):
    pattern = causal(pattern)
    made = layout(pattern, LONGEST, HEADS, kv_heads)
    rows, there = made.read_rows(torch.tensor([position]), position, position)
    where = made.held_rows(position + 1, torch.tensor([position + 1]))[0]
    # The query's own key may be kept in no store that outlives it.
    rules = pattern.split_heads(HEADS)
    for lane, (_, kv_head) in enumerate(made.lanes):
        read = rows[0, lane][there[0, lane]].tolist()
        assert len(set(read)) == len(read)
        for head in range(lane * made.share, (lane + 1) * made.share):
            assert kv_head == head * kv_heads // HEADS
            wanted = rules[head].mask(1, position + 1)[0]
            assert len(read) == int(wanted.sum()), f"{pattern}, head {head} at {position}"
        shelf, first = made.heads[kv_head]
        assert all(first <= row < first + made.shelves[shelf].rows for row in read)
        if len(made.shelves[shelf].stores) == 1:
            assert sorted(read) == sorted(where[kv_head][wanted].tolist())


@settings(max_examples=60)
@given(patterns(), st.integers(1, LONGEST), st.integers(0, 3))
def test_tokens_written_at_once_lie_where_tokens_written_singly_do(pattern, length, headroom):
    made = layout(causal(pattern), LONGEST, HEADS, 2, headroom)
    memory = torch.full((2, made.rows), -1)
    for row, chunks in enumerate(([length], [1] * length)):
        start = 0
        for tokens in chunks:
            position = torch.arange(start, start + tokens)[None]
            rows = made.write_rows(position, position[:, -1:] + 1)
            assert ((rows == SPILL) | (rows >= SPARE_ROWS)).all()
            memory[row].scatter_(0, rows.flatten(), position[:, None, None].expand_as(rows).flatten())
            start += tokens
    assert torch.equal(memory[0, SPARE_ROWS:], memory[1, SPARE_ROWS:])


def test_rows_of_well_known_patterns():
    def rows(pattern, capacity=1000, **changes):
        return layout(pattern, capacity, 1, 1, **changes).rows - SPARE_ROWS

    assert rows(ls.Causal()) == 1000
    assert rows(ls.Local(128)) == 128
    assert rows(ls.Local(128), headroom=7) == 135
    assert rows(ls.Strided(30)) == 1000
    assert rows(ls.Fixed(100, 8)) == 100 + 80
    assert rows(ls.Dilated(4, 10)) == 31
    assert rows(ls.Local(64) | ls.Strided(30)) == 1000
    assert rows(ls.Local(64) | ls.Dilated(4, 10) | ls.Global(3)) == 64 + 3
    assert rows(Thirds() & ls.Local(20)) == 20
    assert rows(ls.Local(2000)) == 1000


def test_heads_of_keys_keep_what_any_of_their_queries_reads():
    mixed = ls.per_head(ls.Local(10), ls.Fixed(20, 2))
    apart = layout(mixed, 1000, 4, 4)
    assert [apart.shelves[shelf].rows for shelf, _ in apart.heads] == [10, 10, 120, 120]
    together = layout(mixed, 1000, 4, 1)
    assert together.rows - SPARE_ROWS == 120
    assert together.share == 1
    assert layout(mixed, 1000, 4, 2).share == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ls.Full(), 10, 1, 1), ls.PatternError, r"Full\(\): a cache is for patterns .* intersect it with Causal"),
        ((ls.Local(3, lookahead=1), 10, 1, 1), ls.PatternError, "no query reads a later key"),
        (
            (ls.RandomBlocks(2, 1, causal=False) & ls.Causal(), 10, 1, 1),
            ls.PatternError,
            "depends on the length of the sequence",
        ),
        (
            (ls.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 4) & ls.Causal(), 10, 1, 1),
            ls.PatternError,
            "covers 8 positions, not 10",
        ),
        ((ls.per_head(ls.Local(3), ls.Local(4)), 10, 3, 3), ls.PatternError, "3 heads do not divide"),
        ((ls.Local(3), 0, 1, 1), ls.PatternError, r"cache\(capacity=0\): capacity must be at least 1"),
        ((ls.Local(3), 2**30, 1, 1), ls.ArgumentError, "at most 1073741823 positions"),
        ((ls.Local(3), 10, 3, 2), ls.ArgumentError, "3 heads must be a multiple of 2 kv_heads"),
        ((ls.Local(3), 10, 1, 1, -1), ls.PatternError, "headroom must be at least 0"),
        (("Local(3)", 10, 1, 1), ls.ArgumentError, "it must be a Pattern"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        layout(*arguments)
