"""Every row of the table of patterns against its formula, restated in plain Python."""

import operator

import pytest
import torch
from hypothesis import given, settings
from tests.oracle import assert_mask_is, positions
from tests.strategies import ATOMS, joined, lengths, per_head_mixes
from torch.nn.attention.flex_attention import create_mask

import longstride as ls


def local(i, j, window, lookahead=0):
    return i - window < j <= i + lookahead


def dilated(i, j, window, dilation, lookahead=0):
    return j in [i - m * dilation for m in range(-lookahead, window)]


def strided(i, j, stride, causal=True):
    return abs(i - j) % stride == 0 and (j <= i or not causal)


def block_local(i, j, block, causal=True):
    return any(start <= i < start + block and start <= j < start + block for start in range(0, 100, block)) and (
        j <= i or not causal
    )


def summary(i, j, block, count, offset=0):
    return j <= i and j % block in range(block)[block - offset - count : block - offset]


def fixed(i, j, block, count, offset=0):
    return block_local(i, j, block) or summary(i, j, block, count, offset)


def log_sparse(i, j, base=2, causal=True):
    near = {0} | {base**power for power in range(8)}
    return (i - j) in near or (not causal and (j - i) in near)


def global_tokens(i, j, tokens, causal=True):
    named = range(tokens) if isinstance(tokens, int) else tokens
    return (i in named or j in named) and (j <= i or not causal)


FORMULAS = [
    (ls.Causal, lambda i, j: j <= i, [()]),
    (ls.Full, lambda i, j: True, [()]),  # noqa: ARG005
    (ls.Local, local, [(1,), (3,), (8,), (99,), (4, 3), (1, 5), (2, 99)]),
    (ls.Dilated, dilated, [(1, 1), (3, 4), (2, 7), (5, 1), (40, 2), (2, 3, 2), (1, 4, 3), (3, 40)]),
    (ls.Strided, strided, [(1,), (2,), (5,), (8,), (60,), (4, False), (7, False), (60, False)]),
    (ls.BlockLocal, block_local, [(1,), (4,), (6,), (60,), (1, False), (5, False), (60, False)]),
    (ls.Summary, summary, [(1, 1), (4, 1), (6, 2), (5, 5), (5, 2, 1), (4, 1, 3), (60, 3), (60, 3, 57)]),
    (ls.Fixed, fixed, [(1, 1), (4, 1), (8, 2), (6, 6), (7, 2, 3), (60, 3), (60, 3, 50)]),
    (ls.LogSparse, log_sparse, [(), (3,), (5,), (2, False), (3, False)]),
    (ls.Global, global_tokens, [(1,), (3,), (50,), ((2, 7, 11),), ((45,),), (3, False), ((2, 7, 11), False)]),
]


@pytest.mark.parametrize(
    ("make", "formula", "arguments"),
    [(make, formula, arguments) for make, formula, cases in FORMULAS for arguments in cases],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_mask_is_the_formula(make, formula, arguments):
    assert_mask_is(make(*arguments), lambda i, j: formula(i, j, *arguments))


def test_a_window_of_three_is_three_keys():
    assert ls.Local(3).mask(20)[10].nonzero().flatten().tolist() == [8, 9, 10]


def test_longformers_window_is_half_on_either_side():
    row = ls.Local(8 // 2 + 1, lookahead=8 // 2).mask(40)[20]
    assert row.nonzero().flatten().tolist() == list(range(16, 25))


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_the_mask_of_the_last_queries_is_the_end_of_the_whole_mask(pattern):
    whole = pattern.mask(41)
    for q_len in (1, 7, 40):
        assert torch.equal(pattern.mask(q_len, 41), whole[-q_len:])


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_the_rule_does_not_depend_on_how_it_is_asked(pattern):
    """One pair, a vector of pairs, a grid, and 32-bit positions all give the mask."""
    pattern = pattern.bind(40)
    wanted = pattern.mask(40)
    i, j = positions(40, 40)
    flat_i, flat_j = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    assert torch.equal(pattern.allows(flat_i.flatten(), flat_j.flatten()), wanted.flatten())
    assert torch.equal(pattern.allows(i[None, None], j[None, None]).expand(1, 1, 40, 40)[0, 0], wanted)
    assert bool(pattern.allows(torch.tensor(29), torch.tensor(5))) == bool(wanted[29, 5])
    assert torch.equal(pattern.allows(i.int(), j.int()).expand(40, 40), wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_the_rule_serves_as_a_flex_attention_mask_mod(pattern):
    pattern = pattern.bind(40)
    made = create_mask(lambda b, h, i, j: pattern.allows(i, j), None, None, 40, 40, device="cpu")  # noqa: ARG005
    assert torch.equal(made[0, 0], pattern.mask(40))


@settings(max_examples=100)
@given(joined(2), joined(2), lengths())
def test_operators_are_those_of_masks(left, right, size):
    for join in (operator.or_, operator.and_):
        assert torch.equal(join(left, right).mask(*size), join(left.mask(*size), right.mask(*size)))


@settings(max_examples=50)
@given(per_head_mixes(), lengths())
def test_a_mask_of_heads_stacks_the_rule_of_every_head(pattern, size):
    mask = pattern.mask(*size, heads=8)
    assert mask.shape == (8, *size)
    for row, rule in zip(mask, pattern.split_heads(8), strict=True):
        assert torch.equal(row, rule.mask(*size))
