"""BigBird's random blocks: the draw, its stability, its spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longstride as ls

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**40))


@settings(max_examples=60)
@given(SIZES, st.booleans())
def test_every_query_block_reads_count_distinct_blocks_whole(sizes, causal):
    block, count, seed = sizes
    blocks = 11
    pattern = ls.RandomBlocks(block, count, seed=seed, causal=causal)
    mask = pattern.mask(blocks * block)
    drawn = mask.unflatten(0, (blocks, block)).unflatten(2, (blocks, block))
    touched = drawn.any(3).any(1)
    for query in range(blocks):
        available = query + 1 if causal else blocks
        assert int(touched[query].sum()) == min(count, available)
        assert not touched[query, available:].any()
    # A drawn block is read whole, but for the keys that a causal query may not see.
    whole = touched[:, None, :, None].expand_as(drawn).reshape(blocks * block, -1)
    assert torch.equal(mask, whole.tril() if causal else whole)


@settings(max_examples=40)
@given(SIZES)
def test_a_causal_draw_stays_as_the_sequence_grows(sizes):
    pattern = ls.RandomBlocks(sizes[0], sizes[1], seed=sizes[2])
    assert torch.equal(pattern.mask(60)[:37, :37], pattern.mask(37))


def test_nothing_random_is_asked_of_torch():
    pattern = ls.RandomBlocks(4, 3, seed=7)
    torch.manual_seed(0)
    before, state = pattern.mask(64), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(pattern.mask(64), before)


def test_the_draw_is_the_same_in_every_version():
    """Fixed numbers: a model that was trained with a pattern needs that very pattern."""
    causal = ls.RandomBlocks(1, 2, seed=5).draws(torch.arange(8)).sort(-1).values
    assert causal.tolist() == [[-1, 0], [0, 1], [1, 2], [0, 1], [0, 1], [0, 4], [1, 3], [5, 6]]
    other_head = ls.RandomBlocks(1, 2, seed=5, causal=False).split_heads(4)[3].draws(torch.arange(4), 100)
    assert other_head.tolist() == [[18, 58], [8, 62], [60, 41], [16, 42]]


@pytest.mark.parametrize("causal", [True, False])
def test_heads_and_seeds_draw_differently(causal):
    pattern = ls.RandomBlocks(2, 2, causal=causal)
    heads = pattern.mask(64, heads=4)
    assert len({tuple(mask.flatten().tolist()) for mask in heads}) == 4
    assert torch.equal(heads[0], pattern.mask(64))
    assert not torch.equal(ls.RandomBlocks(2, 2, seed=1, causal=causal).mask(64), pattern.mask(64))
    # What a head draws does not depend on how many there are.
    assert torch.equal(pattern.mask(64, heads=8)[:4], heads)


def test_heads_of_a_group_draw_differently_too():
    mask = ls.per_head(ls.RandomBlocks(2, 2), ls.Local(3)).mask(64, heads=4)
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask[2], mask[3])


def test_the_draw_is_even():
    """16 blocks, 3 of them for each of 8192 query blocks: 1536 times each, within five standard deviations."""
    drawn = ls.RandomBlocks(1, 3, seed=3, causal=False).draws(torch.arange(8192), 16)
    counts = torch.bincount(drawn.flatten(), minlength=16)
    deviation = (8192 * 3 / 16 * 13 / 16) ** 0.5
    assert (counts - 1536).abs().max() < 5 * deviation


def test_a_draw_of_all_blocks_is_all_blocks():
    assert torch.equal(ls.RandomBlocks(4, 9, causal=False).mask(33), ls.Full().mask(33))
    assert torch.equal(ls.RandomBlocks(4, 9).mask(33), ls.Causal().mask(33))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 0, "count": 1}, r"RandomBlocks\(block=0\): block must be at least 1"),
        ({"block": 4, "count": 0}, r"RandomBlocks\(count=0\): count must be at least 1"),
        ({"block": 4, "count": 1, "seed": -1}, r"RandomBlocks\(seed=-1\): seed must be at least 0"),
        ({"block": 4, "count": 1.5}, r"RandomBlocks\(count=1.5\): count must be a whole number"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ls.PatternError, match=message):
        ls.RandomBlocks(**arguments)
