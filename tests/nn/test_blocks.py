import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longstride.nn import FeedForward, ResidualBlock, sigmoid_gelu


def test_sigmoid_gelu_values():
    x = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    expected = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    assert sigmoid_gelu(x).tolist() == pytest.approx(expected, rel=1e-12)
    # It approximates GELU: within 0.021 everywhere.
    line = torch.linspace(-6, 6, 1001)
    assert (sigmoid_gelu(line) - F.gelu(line)).abs().max() < 0.021


def test_feed_forward_formula():
    network = FeedForward(4, 6).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    inner = x @ network.up_proj.weight.T + network.up_proj.bias
    expected = (inner * torch.sigmoid(1.702 * inner)) @ network.down_proj.weight.T + network.down_proj.bias
    torch.testing.assert_close(network(x), expected)


def test_block_is_the_papers_resblock():
    attention, feed_forward = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    block = ResidualBlock(attention, feed_forward, hidden_size=4, norm_eps=1e-3).double()
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight + layer.bias

    a = attention(norm(hidden, block.attention_norm))
    b = feed_forward(norm(hidden + a, block.feed_forward_norm))
    torch.testing.assert_close(block(hidden), hidden + a + b)


class _Ones(nn.Module):
    def forward(self, hidden):
        return torch.ones_like(hidden)


def test_dropout_falls_on_the_two_residual_additions():
    torch.manual_seed(0)
    block = ResidualBlock(_Ones(), _Ones(), hidden_size=64, dropout=0.25).train()
    added = block(torch.zeros(1, 1000, 64))
    kept = 1 / 0.75
    shares = [torch.isclose(added, torch.tensor(total)).float().mean().item() for total in (0.0, kept, 2 * kept)]
    assert shares == pytest.approx([0.0625, 0.375, 0.5625], abs=0.01)
    assert torch.equal(block.eval()(torch.zeros(1, 3, 64)), torch.full((1, 3, 64), 2.0))


def test_the_residual_stream_itself_is_never_dropped():
    block = ResidualBlock(nn.Identity(), nn.Identity(), hidden_size=8, dropout=0.999).train()
    torch.manual_seed(1)
    hidden = torch.randn(4, 8)
    assert torch.isclose(block(hidden), hidden).float().mean() > 0.9
