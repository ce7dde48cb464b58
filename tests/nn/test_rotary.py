import math

import pytest
import torch

import longstride as ls
from longstride.errors import ArgumentError
from longstride.nn import RotaryPositions, RotarySelfAttention, rotate


def test_rotation_multiplies_complex_numbers():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    turned = rotate(x, RotaryPositions(8, base=100.0)(torch.arange(7)))
    numbers = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(7)[:, None] * torch.tensor([100.0 ** (-m / 4) for m in range(4)])
    expected = numbers * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=1e-6, atol=1e-6)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    rotary = RotaryPositions(16)

    def score(i, j):
        return (rotate(q, rotary(torch.tensor([i]))) * rotate(k, rotary(torch.tensor([j])))).sum().item()

    assert score(9, 4) == pytest.approx(score(1009, 1004), abs=1e-5)
    assert score(5, 5) == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_angles_of_far_positions_are_exact():
    cos, sin = RotaryPositions(4, base=10.0)(torch.tensor([1_048_575]))
    for m in range(2):
        angle = 1_048_575 * 10.0 ** (-m / 2)
        assert cos[0, m].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, m].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos.dtype == torch.float32


def test_a_rotation_a_row():
    rotary = RotaryPositions(8)
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    rows = rotate(x, rotary(positions))
    for row in range(2):
        assert torch.equal(rows[row : row + 1], rotate(x[row : row + 1], rotary(positions[row])))


def test_halves_stay_halves_and_norms_stay():
    x = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    rotation = RotaryPositions(8)(torch.arange(6))
    assert rotate(x, rotation).dtype == torch.bfloat16
    x = x.double()
    torch.testing.assert_close(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_odd_heads_are_refused():
    with pytest.raises(ArgumentError, match="head_dim=7: rotary positions turn pairs of numbers"):
        RotaryPositions(7)


@pytest.mark.parametrize("text", ["Local(3)", "per_head(Local(3), Strided(4))"])
def test_layer_equals_dense_softmax_of_normalised_and_rotated_heads(text):
    torch.manual_seed(0)
    pattern = ls.parse(text)
    layer = RotarySelfAttention(pattern, hidden_size=16, num_heads=2, qk_hidden_size=8, norm_eps=1e-3).double()
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    rotation = RotaryPositions(4)(torch.arange(11))
    q, k, v = (
        part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (x @ layer.qkv_proj.weight.T).split([8, 8, 16], -1)
    )

    def normalised(heads, norm):
        return rotate(heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight, rotation)

    scores = normalised(q, layer.q_norm) @ normalised(k, layer.k_norm).transpose(-1, -2) / math.sqrt(4)
    scores = scores.masked_fill(~pattern.mask(11, heads=2), -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x, rotation), expected)


def test_autocast_norms_in_float32_and_attends_in_half():
    layer = RotarySelfAttention(ls.Local(3), hidden_size=16, num_heads=2)
    x, rotation = torch.randn(1, 9, 16), RotaryPositions(8)(torch.arange(9))
    expected = layer(x, rotation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, rotation)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
