import math

import pytest
import torch
from torch import nn

from longstride.nn import FactorizedPositions, FeedForward, LogitsProjection, ResidualProjection, initialize_


@pytest.mark.parametrize(
    ("module", "std"),
    [
        (nn.Linear(256, 1024), 0.125 / math.sqrt(256)),
        (ResidualProjection(1024, 256), 0.125 / math.sqrt(1024) / math.sqrt(2 * 12)),
        (nn.Embedding(1000, 256), 0.125 / math.sqrt(256)),
        (FactorizedPositions((700, 300, 3), 256), 0.125 / math.sqrt(256 * 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_standard_deviations_of_the_paper(module, std):
    torch.manual_seed(0)
    initialize_(module, num_layers=12)
    weight = module.weight.detach()
    # 256,000 draws: the sample's deviation is within 0.14 % of the true one (one sigma), its mean within std / 500.
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert abs(weight.mean().item()) < std / 100
    # Normal, not uniform: 4.55 % lie beyond two deviations.
    assert ((weight.abs() > 2 * std).float().mean().item()) == pytest.approx(0.0455, abs=0.003)


def test_scale_is_a_factor():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    initialize_(linear, num_layers=1, scale=1.0)
    assert linear.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


def test_biases_logits_and_norms():
    for module in (nn.Linear(8, 8), ResidualProjection(8, 8), nn.LayerNorm(8)):
        nn.init.constant_(module.bias, 3.0)
        initialize_(module, num_layers=2)
        assert module.bias.abs().max() == 0
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.weight, 3.0)
    initialize_(norm, num_layers=2)
    assert torch.equal(norm.weight, torch.ones(8))
    logits = LogitsProjection(8, 16, bias=False)
    initialize_(logits, num_layers=2)
    assert torch.equal(logits.weight, torch.zeros(16, 8))


def test_only_the_modules_own_parameters_are_drawn():
    network = FeedForward(8, 16)
    before = network.up_proj.weight.clone()
    initialize_(network, num_layers=2)
    assert torch.equal(network.up_proj.weight, before)
