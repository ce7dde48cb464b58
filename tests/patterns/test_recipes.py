"""Published models' patterns against their papers' definitions."""

import pytest
import torch

import longstride as ls


def test_recipes_are_these_patterns():
    assert ls.longformer(8, 2) == ls.Local(5, lookahead=4) | ls.Global(2, causal=False)
    assert ls.longformer(9, (0, 7)) == ls.Local(5, lookahead=4) | ls.Global((0, 7), causal=False)
    assert ls.longformer(8, 0) == ls.Local(5, lookahead=4)
    assert ls.mistral(4096) == ls.Local(4096)
    assert ls.sparse_transformer_strided(128) == ls.Local(128) | ls.Strided(128)
    assert ls.sparse_transformer_fixed(128, 8) == ls.Fixed(128, 8)
    assert ls.gpt3(256) == (ls.Causal(), ls.Local(256))
    assert ls.bigbird(8, 3, 1, 2, seed=4) == (
        ls.Local(13, lookahead=12) | ls.Global(8, causal=False) | ls.RandomBlocks(8, 2, seed=4, causal=False)
    )
    assert ls.bigbird(8, 5, 0, 0) == ls.Local(21, lookahead=20)


def test_longformer_reads_half_its_window_on_either_side_and_the_global_tokens():
    mask = ls.longformer(6, (0, 20)).mask(40).tolist()
    for i in range(40):
        for j in range(40):
            assert mask[i][j] == (abs(i - j) <= 3 or i in (0, 20) or j in (0, 20)), (i, j)


def test_strided_and_fixed_attention_are_the_papers_equations():
    """Child 2019, section 4.3, with l = 6 and c = 2; positions count from 0."""
    strided, fixed = ls.sparse_transformer_strided(6).mask(40), ls.sparse_transformer_fixed(6, 2).mask(40)
    for i in range(40):
        a1, a2 = set(range(max(0, i - 5), i + 1)), {j for j in range(i + 1) if (i - j) % 6 == 0}
        assert set(strided[i].nonzero().flatten().tolist()) == a1 | a2
        a1 = {j for j in range(i + 1) if j // 6 == i // 6}
        a2 = {j for j in range(i + 1) if j % 6 in range(6 - 2, 6)}
        assert set(fixed[i].nonzero().flatten().tolist()) == a1 | a2


def test_bigbird_reads_its_window_the_global_blocks_and_its_draw():
    mask = ls.bigbird(4, 3, 2, 3, seed=1).mask(64)
    assert mask[:8].all()
    assert mask[:, :8].all()
    assert mask.diagonal(-6).all()
    assert mask.diagonal(6).all()
    random = ls.RandomBlocks(4, 3, seed=1, causal=False).mask(64)
    assert torch.equal(mask, mask | random)
    assert int(random[30].sum()) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.longformer(1), r"longformer\(window=1\): window must be at least 2"),
        (lambda: ls.longformer(8, -1), r"tokens=-1"),
        (lambda: ls.bigbird(0), r"bigbird\(block=0\): block must be at least 1"),
        (lambda: ls.bigbird(8, 2), r"bigbird\(window_blocks=2\): window_blocks must be odd"),
        (lambda: ls.bigbird(8, random_blocks=-1), r"random_blocks=-1"),
        (lambda: ls.mistral(0), r"window=0"),
        (lambda: ls.sparse_transformer_strided(0), r"=0\): .* must be at least 1"),
        (lambda: ls.sparse_transformer_fixed(4, 5), r"at most block"),
        (lambda: ls.gpt3(-1), r"window=-1"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ls.PatternError, match=message):
        make()
