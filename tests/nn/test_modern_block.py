import pytest
import torch
from torch import nn

from longstride.nn import GatedFeedForward, ModernBlock


def test_swiglu_formula():
    network = GatedFeedForward(4, 6).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    gate, up = (x @ network.gate_up_proj.weight.T).split(6, -1)
    expected = (gate * gate.sigmoid() * up) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x), expected)
    assert [name for name, _ in network.named_parameters()] == ["gate_up_proj.weight", "down_proj.weight"]


def test_block_is_pre_norm_with_rms_norms():
    attention, feed_forward = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    block = ModernBlock(attention, feed_forward, hidden_size=4, norm_eps=1e-3).double()
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight

    middle = hidden + attention(norm(hidden, block.attention_norm))
    torch.testing.assert_close(block(hidden), middle + feed_forward(norm(middle, block.feed_forward_norm)))


class _Ones(nn.Module):
    def forward(self, hidden):
        return torch.ones_like(hidden)


def test_dropout_falls_on_the_two_residual_additions():
    torch.manual_seed(0)
    block = ModernBlock(_Ones(), _Ones(), hidden_size=64, dropout=0.25).train()
    added = block(torch.zeros(1, 1000, 64))
    kept = 1 / 0.75
    shares = [torch.isclose(added, torch.tensor(total)).float().mean().item() for total in (0.0, kept, 2 * kept)]
    assert shares == pytest.approx([0.0625, 0.375, 0.5625], abs=0.01)
    assert torch.equal(block.eval()(torch.zeros(1, 3, 64)), torch.full((1, 3, 64), 2.0))
