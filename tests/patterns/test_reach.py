"""`reach` and `layers_to_reach`: what a query can draw on through several layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import joined, patterns

import longstride as ls

EVERY_EARLIER = torch.ones(64, 64, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "schedule",
    [
        (ls.Local(8), ls.Strided(8)),
        (ls.Strided(8), ls.Local(8)),
        (ls.Local(8) | ls.Strided(8),) * 2,
        (ls.per_head(ls.Local(8), ls.Strided(8)),) * 2,
        (ls.BlockLocal(8), ls.Fixed(8, 1)),
        (ls.Fixed(8, 1),) * 2,
        (ls.Causal(),),
    ],
    ids=str,
)
def test_factorised_attention_reaches_every_earlier_position(schedule):
    assert torch.equal(ls.reach(schedule, 64), EVERY_EARLIER)
    # And the last layer alone does not, unless it is dense.
    assert len(schedule) == 1 or not torch.equal(ls.reach(schedule[-1:], 64), EVERY_EARLIER)


@pytest.mark.parametrize("schedule", [(ls.Local(7), ls.Strided(8)), (ls.Local(8), ls.Strided(9))], ids=str)
def test_a_window_shorter_than_the_stride_leaves_gaps(schedule):
    assert not torch.equal(ls.reach(schedule, 64), EVERY_EARLIER)


@settings(max_examples=40)
@given(st.lists(patterns(), min_size=1, max_size=3), st.integers(1, 24))
def test_reach_follows_every_path(schedule, length):
    """Against sets: a query of the last layer draws on all that its keys draw on, and so down to the first layer."""
    reached = [{position} for position in range(length)]
    for pattern in schedule:
        mask = pattern.mask(length)
        mask = mask.any(0) if mask.dim() == 3 else mask
        reached = [set().union(*(reached[key] for key in row.nonzero().flatten().tolist())) for row in mask]
    assert ls.reach(schedule, length).tolist() == [[key in row for key in range(length)] for row in reached]


@settings(max_examples=40)
@given(joined(), st.integers(1, 4))
def test_reach_of_one_pattern_repeats_it(pattern, layers):
    assert torch.equal(pattern.reach(20, layers), ls.reach([pattern] * layers, 20))
    assert torch.equal(pattern.reach(20), pattern.mask(20))


def test_the_first_layer_comes_first():
    # A query reads the summary of position 3 in the last layer, which read 0 .. 3 in the first ...
    assert ls.reach([ls.BlockLocal(4), ls.Summary(4, 1)], 8)[5].tolist() == [True] * 4 + [False] * 4
    # ... and the other way round, 4 and 5 read the summary position 3 in the first layer.
    assert ls.reach([ls.Summary(4, 1), ls.BlockLocal(4)], 8)[5].tolist() == [False] * 3 + [True] + [False] * 4


@pytest.mark.parametrize(("window", "length"), [(2, 20), (8, 64), (9, 64), (10, 65), (64, 64), (100, 64), (3, 100)])
def test_a_window_alone_needs_as_many_layers_as_windows_cover_the_length(window, length):
    assert ls.layers_to_reach([ls.Local(window)], length) == -(-(length - 1) // (window - 1))


@pytest.mark.parametrize(
    ("schedule", "layers"),
    [
        ([ls.Causal()], 1),
        ([ls.Local(8), ls.Strided(8)], 2),
        ([ls.Strided(8), ls.Local(8)], 2),
        ([ls.Fixed(8, 2)], 2),
        ([ls.Local(8) | ls.Strided(8)], 2),
        ([ls.Causal(), ls.Local(4)], 1),
        ([ls.Local(4), ls.Causal()], 2),
        ([ls.Local(1)], None),
        ([ls.Strided(4)], None),
        ([ls.BlockLocal(8), ls.BlockLocal(16)], None),
        ([ls.Dilated(3, 4), ls.Strided(2)], None),
    ],
    ids=str,
)
def test_layers_to_reach_everything(schedule, layers):
    assert ls.layers_to_reach(schedule, 64) == layers


@settings(max_examples=40)
@given(st.lists(joined(2), min_size=1, max_size=2), st.integers(2, 20))
def test_layers_to_reach_is_the_first_depth_whose_reach_is_complete(schedule, length):
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    depths = range(1, 2 * length * len(schedule))
    complete = (
        depth
        for depth in depths
        if (ls.reach([schedule[layer % len(schedule)] for layer in range(depth)], length) | ~earlier).all()
    )
    assert ls.layers_to_reach(schedule, length) == next(complete, None)


def test_no_layers_and_no_length_are_errors():
    with pytest.raises(ls.PatternError, match="at least one layer"):
        ls.reach([], 8)
    with pytest.raises(ls.PatternError, match="at least one layer"):
        ls.layers_to_reach([], 8)
    with pytest.raises(ls.PatternError, match="layers=0"):
        ls.Local(3).reach(8, 0)
    with pytest.raises(ls.PatternError, match="length=0"):
        ls.Local(3).reach(0)
