"""Tiles: every pair of a part scored once, and `scored_pairs` honest about the rest."""

import pytest
from hypothesis import given, settings
from tests.oracle import assert_scores_what_it_says, assert_tiles_are_the_part
from tests.strategies import ATOMS, joined, lengths, patterns

import longstride as ls
from longstride.plan import Dense, tiles


@pytest.mark.parametrize("left", ATOMS, ids=str)
def test_the_tiles_of_two_atoms_score_every_pair_once(left):
    for right in ATOMS:
        for pattern in (left | right, left & right):
            for size in ((37, 37), (1, 33), (7, 40)):
                for part in ls.plan(pattern, *size).parts:
                    assert_tiles_are_the_part(part, *size)


@settings(max_examples=200)
@given(joined(5), lengths())
def test_the_tiles_of_any_expression_score_every_pair_once(pattern, size):
    for part in ls.plan(pattern, *size).parts:
        assert_tiles_are_the_part(part, *size)


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Causal(),
        ls.Local(70),
        ls.Local(300, lookahead=100),
        ls.Dilated(40, 3, lookahead=10),
        ls.Strided(16),
        ls.BlockLocal(64, causal=False),
        ls.Fixed(32, 4),
        ls.Fixed(64, 48),
        ls.Fixed(16, 2, 5) | ls.Local(40),
        ls.longformer(64, 40),
        ls.Global(150),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(512, 512), (509, 509), (300, 701), (1, 600), (17, 530)])
def test_lengths_of_many_tiles_too(pattern, size):
    """Longer than the strategies draw: tiles by the hundred, staircases of several levels, open and ragged ends."""
    for part in ls.plan(pattern, *size).parts:
        assert_tiles_are_the_part(part, *size)


@settings(max_examples=50)
@given(patterns(), lengths())
def test_a_plan_scores_at_least_what_is_allowed(pattern, size):
    made = ls.plan(pattern, *size, 4)
    counted = sum(
        len(heads) * tile.scored_pairs for heads, parts in made.groups for part in parts for tile in tiles(part, *size)
    )
    assert made.scored_pairs == counted
    assert made.scored_pairs >= made.pairs == pattern.pairs(*size, heads=4)


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Causal(),
        ls.Local(20),
        ls.Local(20, lookahead=7),
        ls.Strided(9),
        ls.Fixed(16, 3),
        ls.Local(20) | ls.Strided(20),
        ls.longformer(20, 3),
        ls.bigbird(8),
        ls.per_head(ls.Local(20), ls.Strided(9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(200, 200), (50, 200)])
def test_the_torch_backend_scores_the_pairs_that_the_plan_says(pattern, size):
    """Counted where the products are made, so that `scored_pairs` can be believed."""
    assert_scores_what_it_says(pattern, *size)


def test_dense_tiles_hold_no_pair_that_does_not_count():
    """Strides, whole blocks and the far summaries go to a fused kernel, which knows no mask but the triangle."""
    for pattern, dense in ((ls.Strided(16), 1.0), (ls.BlockLocal(32), 1.0), (ls.Fixed(64, 32), 0.5)):
        cut = [tile for part in ls.plan(pattern, 512).parts for tile in tiles(part, 512, 512)]
        exact = sum(tile.scored_pairs for tile in cut if isinstance(tile, Dense))
        assert exact >= dense * pattern.pairs(512)
