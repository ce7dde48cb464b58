"""Operators, heads, and patterns as values."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from tests.strategies import ATOMS, joined, per_head_mixes

import longstride as ls


def test_and_and_or_point_to_the_operators():
    for join in (lambda a, b: a and b, lambda a, b: a or b, lambda a, _: not a):
        with pytest.raises(ls.PatternError, match=r"Local\(3\): .* join patterns with \| and &, not or and and"):
            join(ls.Local(3), ls.Strided(4))


def test_only_patterns_join():
    for other in (3, "Local(3)", torch.ones(3, 3, dtype=torch.bool), None):
        with pytest.raises(TypeError, match="unsupported operand"):
            ls.Local(3) | other
        with pytest.raises(TypeError, match="unsupported operand"):
            ls.Local(3) & other


def test_joins_are_flat_and_name_nobody_twice():
    a, b, c = ls.Local(3), ls.Strided(4), ls.Global(2)
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a | a == a
    assert a & b & a == a & b
    assert (a | b) & c != a | (b & c)


@pytest.mark.parametrize("pattern", [*ATOMS, ls.Local(3) | ls.Strided(4), ls.per_head(ls.Local(3), ls.Full())], ids=str)
def test_patterns_are_values(pattern):
    again = pickle.loads(pickle.dumps(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert {pattern: 1}[again] == 1
    assert pattern != ls.Local(1234)


def test_a_pattern_does_not_change():
    with pytest.raises(AttributeError):
        ls.Local(3).window = 4


@settings(max_examples=60)
@given(joined(2), joined(2))
def test_equal_patterns_have_equal_rules(left, right):
    if left == right:
        assert torch.equal(left.mask(40), right.mask(40))


def test_groups_of_neighbouring_heads_share_a_pattern():
    a, b = ls.Local(3), ls.Strided(4)
    pattern = ls.per_head(a, b)
    assert pattern.num_heads == 2
    assert pattern.split_heads(2) == (a, b)
    assert pattern.split_heads(6) == (a, a, a, b, b, b)
    assert torch.equal(pattern.mask(9), torch.stack([a.mask(9), b.mask(9)]))
    assert pattern.pairs(9) == a.pairs(9) + b.pairs(9)
    assert pattern.pairs(9, heads=6) == 3 * pattern.pairs(9)


def test_heads_that_do_not_divide_are_an_error():
    pattern = ls.per_head(ls.Local(3), ls.Strided(4))
    asked = (pattern.split_heads, lambda n: pattern.mask(9, heads=n), lambda n: ls.plan(pattern, 9, 9, n))
    for ask in asked:
        with pytest.raises(ls.PatternError, match=r"3 heads do not divide into 2 equal groups; use a multiple of 2"):
            ask(3)


def test_joined_heads_meet_head_by_head():
    four = ls.per_head(ls.Global(1), ls.Global(2), ls.Causal(), ls.Local(1))
    pattern = ls.per_head(ls.Local(3), ls.Strided(4)) | four
    assert pattern.num_heads == 4
    assert pattern.split_heads(4) == (
        ls.Local(3) | ls.Global(1),
        ls.Local(3) | ls.Global(2),
        ls.Strided(4) | ls.Causal(),
        ls.Strided(4) | ls.Local(1),
    )
    assert (pattern & ls.Fixed(8, 2)).split_heads(4)[3] == (ls.Strided(4) | ls.Local(1)) & ls.Fixed(8, 2)


@settings(max_examples=40)
@given(per_head_mixes())
def test_a_split_pattern_no_longer_tells_heads_apart(pattern):
    for rule in pattern.split_heads(4):
        assert rule.num_heads is None
        assert rule.mask(12).dim() == 2


@pytest.mark.parametrize("members", [(), (3,), ("Local(3)",), (ls.Local(3), None)])
def test_per_head_takes_patterns_alone(members):
    with pytest.raises(ls.PatternError, match="per_head"):
        ls.per_head(*members)


def test_per_head_does_not_nest():
    with pytest.raises(ls.PatternError, match="list its patterns instead"):
        ls.per_head(ls.Local(3), ls.per_head(ls.Local(3), ls.Full()))
    with pytest.raises(ls.PatternError, match="list its patterns instead"):
        ls.per_head(ls.Local(3) | ls.per_head(ls.Local(3), ls.Full()))


def test_a_rule_for_heads_is_refused_where_one_rule_is_needed():
    with pytest.raises(ls.PatternError, match=r"split_heads\(num_heads\)"):
        ls.per_head(ls.Local(3), ls.Full()).terms()


def test_the_picture_shows_heads_one_after_another():
    assert ls.picture(ls.per_head(ls.Local(1), ls.Causal()), 2) == "# .\n. #\n\n# .\n# #"
