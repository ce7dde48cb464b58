"""`allows` as FlexAttention's mask_mod: it is traced under vmap, with scalar indices."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import longstride as ls

PATTERNS = [
    ls.Causal(),
    ls.Full(),
    ls.Local(5, lookahead=2),
    ls.Dilated(3, 2),
    ls.Strided(5),
    ls.BlockLocal(6),
    ls.Summary(6, 2),
    ls.Fixed(8, 2),
    ls.LogSparse(3),
    ls.Global(3),
    ls.Global((2, 7, 11), causal=False),
    ls.RandomBlocks(4, 2),
    ls.BlockSparse(torch.eye(10, dtype=torch.bool), 4),
    ls.Local(4) | ls.Strided(4) & ls.Local(20),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_allows_is_a_mask_mod(pattern: ls.Pattern) -> None:
    mask = create_mask(lambda _batch, _head, i, j: pattern.allows(i, j), None, None, 40, 40, device="cpu")
    assert torch.equal(mask[0, 0], pattern.mask(40))
