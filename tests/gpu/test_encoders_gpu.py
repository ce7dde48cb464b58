"""Encoders on a CUDA device: padded rows against the rows alone, and our layers against transformers' there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import longstride as ls

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import encoders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch's own, while it compiles
]

DEVICE = "cuda"
PATTERNS = [ls.longformer(64, 3), ls.bigbird(16), ls.Strided(16, causal=False) | ls.Global((0, 70), causal=False)]


@pytest.mark.parametrize("block", ["sparse_transformer", "modern"])
@pytest.mark.parametrize("global_projections", ["shared", "separate"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_padded_rows(pattern: ls.Pattern, block: str, global_projections: str, compiled: bool) -> None:
    """Outputs and gradients, in float32; compiled graphs get the mask as it is."""
    if compiled and (block, global_projections) != ("modern", "separate"):
        pytest.skip("compiled is what has the most in it")
    torch.compiler.reset()
    torch.manual_seed(0)
    config = ls.SparseTransformerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=300, block=block,
        patterns=[pattern], global_projections=global_projections, initializer_scale=1.0,
    )  # fmt: skip
    model = ls.SparseTransformerForMaskedLM(config).to(DEVICE).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    lengths = (300, 100, 33, 1)
    ids, mask = torch.zeros(4, 300, dtype=torch.long), torch.zeros(4, 300, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 300 - length :] = torch.randint(256, (length,))
        mask[row, 300 - length :] = 1
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    runs = torch.compile(model, fullgraph=True) if compiled else model
    logits = runs(ids, attention_mask=mask).logits
    alone = [model(ids[row : row + 1, 300 - length :]).logits[0] for row, length in enumerate(lengths)]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(logits[row][mask[row] == 1], expected, rtol=2e-3, atol=2e-3)
    weights = [torch.randn_like(expected) for expected in alone]
    parameters = list(model.parameters())
    found = torch.autograd.grad(
        sum((logits[row][mask[row] == 1] * weight).sum() for row, weight in enumerate(weights)), parameters
    )
    expected = torch.autograd.grad(
        sum((x * weight).sum() for x, weight in zip(alone, weights, strict=True)), parameters
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_transformers(dtype: torch.dtype) -> None:
    for pair in encoders.pairs(heads=2, length=1536, shrink=2):
        found = encoders.errors(pair, 1536, dtype, DEVICE)
        # float32 products may be in TF32 on either side.
        assert max(error for name, error in found.items() if name.startswith("ours")) < 2e-2, found
