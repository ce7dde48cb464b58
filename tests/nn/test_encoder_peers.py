"""Our encoder layers against transformers' Longformer and BigBird with the same weights: outputs and all gradients."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from encoder_peers import bigbird_pair, counted_blocks, longformer_pair

WIDTH, HEADS = 24, 3


def results(layer, gradients, modules, hidden, counts):
    """The layer's output at real tokens, and the gradients of hidden and of all weights and biases."""
    hidden = hidden.clone().requires_grad_()
    for module in modules:
        module.zero_grad()
    out = layer(hidden, counts)
    length = hidden.shape[1]
    real = torch.arange(length) < (length if counts is None else counts[:, None])
    out = torch.where(real[..., None], out, 0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), hidden.grad, *(x.clone() for x in gradients())]


def assert_equal(pair, hidden, counts, tolerance):
    ours = results(pair.ours, pair.gradients_of_ours, pair.modules, hidden, counts)
    theirs = results(pair.theirs, pair.gradients_of_theirs, pair.modules, hidden, counts)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        # A bias of keys has no gradient but rounding; so the scale is that of all.
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("length", [64, 77, 160])
@pytest.mark.parametrize("tokens", [1, (0, 5, 40)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_longformer(length, tokens, padded):
    """In float32: their softmax is in float32 whatever the inputs. Rows have three, two and one global tokens."""
    torch.manual_seed(0)
    pair = longformer_pair(16, tokens, hidden_size=WIDTH, num_heads=HEADS)
    counts = torch.tensor([length, 37, 5]) if padded else None
    assert_equal(pair, torch.randn(3, length, WIDTH), counts, 2e-5)


@pytest.mark.parametrize(("length", "block", "random_blocks"), [(96, 8, 3), (128, 8, 1), (192, 16, 3), (768, 32, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_bigbird(length, block, random_blocks, padded):
    torch.manual_seed(0)
    pair = bigbird_pair(block, random_blocks, length, hidden_size=WIDTH, num_heads=HEADS).to(torch.float64)
    counts = torch.tensor([length, length - block // 2, length // 2]) if padded else None
    assert_equal(pair, torch.randn(3, length, WIDTH, dtype=torch.float64), counts, 1e-12)


@pytest.mark.parametrize("length", [3072, 4096])
def test_bigbird_draws_no_block_twice_at_the_lengths_of_its_paper(length):
    counted = counted_blocks(bigbird_pair(64, 3, length, hidden_size=WIDTH, num_heads=HEADS).modules[1], length)
    assert counted.max() == 1
    assert (counted[:, 2:-2].sum(-1) == 5 + 3).all()  # the first, the last, a window of three, three random


def test_bigbird_counts_blocks_twice_at_1024():
    """There ours and theirs differ: where a block is counted once, rows are equal; theirs is a softmax with weights."""
    torch.manual_seed(0)
    length, block = 1024, 64
    pair = bigbird_pair(block, 3, length, hidden_size=WIDTH, num_heads=HEADS).to(torch.float64)
    theirs = pair.modules[1]
    counted = counted_blocks(theirs, length)
    twice = (counted > 1).any(-1)  # [heads, query blocks]
    assert twice.any()
    hidden = torch.randn(1, length, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        ours, found = pair.ours(hidden, None), pair.theirs(hidden, None)
        q, k, v = (
            linear(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (theirs.query, theirs.key, theirs.value)
        )
        weights = counted.double().log().repeat_interleave(block, 1).repeat_interleave(block, 2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + weights
        weighted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, weighted, rtol=1e-12, atol=1e-12)
    by_head = (ours - found).unflatten(-1, (HEADS, -1)).abs().amax((0, -1)).unflatten(0, (-1, block)).amax(1).T
    assert torch.equal(by_head > 1e-10, twice)
