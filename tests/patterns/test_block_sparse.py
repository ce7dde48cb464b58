"""Block layouts of one's own."""

import pytest
import torch
from tests.strategies import random_table

import longstride as ls


@pytest.mark.parametrize(("block", "q_len", "kv_len"), [(1, 9, 9), (4, 30, 30), (5, 7, 23), (4, 1, 29)])
def test_the_table_is_read_block_by_block(block, q_len, kv_len):
    table = random_table(1, block, length=32)
    wanted = [[bool(table[i // block, j // block]) for j in range(kv_len)] for i in range(kv_len - q_len, kv_len)]
    assert ls.BlockSparse(table, block).mask(q_len, kv_len).tolist() == wanted


def test_a_layout_a_head():
    table = random_table(1, 4, 2, length=32)
    pattern = ls.BlockSparse(table, 4)
    assert pattern.num_heads == 2
    assert torch.equal(pattern.mask(30), torch.stack([ls.BlockSparse(layout, 4).mask(30) for layout in table]))
    assert pattern.split_heads(4) == tuple(ls.BlockSparse(table[head], 4) for head in (0, 0, 1, 1))
    assert pattern.pairs(30) == int(pattern.mask(30).sum())
    with pytest.raises(ls.PatternError, match="3 heads do not divide into 2 equal groups"):
        pattern.split_heads(3)


def test_equal_content_makes_equal_patterns():
    table = random_table(1, 4)
    assert ls.BlockSparse(table, 4) == ls.BlockSparse(table.clone(), 4)
    assert hash(ls.BlockSparse(table, 4)) == hash(ls.BlockSparse(table.clone(), 4))
    assert ls.BlockSparse(table, 4) != ls.BlockSparse(table, 5)
    assert ls.BlockSparse(table, 4) != ls.BlockSparse(~table, 4)
    # The same bits in another shape are another table.
    row = torch.ones(4, 1, dtype=torch.bool)
    assert ls.BlockSparse(row, 4) != ls.BlockSparse(row.T, 4)


def test_the_table_is_copied():
    table = random_table(1, 4)
    pattern = ls.BlockSparse(table, 4)
    before = pattern.mask(40)
    table.logical_not_()
    assert torch.equal(pattern.mask(40), before)


def test_the_text_names_the_table_and_tables_gives_it():
    table = random_table(1, 4)
    pattern = ls.BlockSparse(table, 4) & ls.Causal() | ls.BlockSparse(~table, 4) & ls.Local(3)
    assert set(pattern.tables()) == {ls.BlockSparse(t, 4).table_name for t in (table, ~table)}
    assert ls.parse(str(pattern), pattern.tables()) == pattern
    assert ls.per_head(pattern, ls.Local(3)).tables().keys() == pattern.tables().keys()
    assert ls.Local(3).tables() == {}


@pytest.mark.parametrize(
    ("table", "block", "words"),
    [
        (torch.ones(4, 4), 4, ["torch.float32 [4, 4]", "must be a bool tensor"]),
        (torch.ones(4, 4, dtype=torch.int64), 4, ["torch.int64 [4, 4]", "must be a bool tensor"]),
        (torch.ones(4, dtype=torch.bool), 4, ["torch.bool [4]", "[q_blocks, kv_blocks]"]),
        (torch.ones(1, 2, 4, 4, dtype=torch.bool), 4, ["[1, 2, 4, 4]", "[heads, q_blocks, kv_blocks]"]),
        (torch.ones(0, 4, dtype=torch.bool), 4, ["[0, 4]", "must not be empty"]),
        ([[True]], 4, ["list", "must be a bool tensor"]),
        (torch.ones(4, 4, dtype=torch.bool), 0, ["block=0", "at least 1"]),
        (torch.ones(4, 4, dtype=torch.bool), 2.0, ["block=2.0", "whole number"]),
    ],
)
def test_bad_tables(table, block, words):
    with pytest.raises(ls.PatternError) as raised:
        ls.BlockSparse(table, block)
    for word in ["BlockSparse", *words]:
        assert word in str(raised.value)


@pytest.mark.parametrize("shape", [(3, 3), (3, 9), (9, 3)])
def test_positions_past_the_table_are_an_error(shape):
    pattern = ls.BlockSparse(torch.ones(shape, dtype=torch.bool), 4)
    assert pattern.mask(12).all()
    q = torch.zeros(1, 1, 13, 4)
    asked = (
        lambda: pattern.mask(13),
        lambda: pattern.pairs(13),
        lambda: pattern.pairs(1, 13),
        lambda: ls.plan(pattern, 13),
        lambda: (pattern | ls.Local(3)).mask(13),
        lambda: ls.attention(q, q, q, pattern),
        lambda: ls.attention(q, q, q, pattern & ls.Causal(), backend="reference"),
    )
    for ask in asked:
        with pytest.raises(ls.PatternError, match=r"covers 12 positions, not 13; give a larger table"):
            ask()
