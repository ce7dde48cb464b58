import pytest
import torch

from longstride.errors import ArgumentError
from longstride.nn import FactorizedPositions, default_axes


@pytest.mark.parametrize("axes", [(7,), (4, 5), (3, 2, 4), (2, 2, 2, 3)])
def test_digits_are_those_of_the_mixed_radix_number(axes):
    total = torch.tensor(axes).prod().item()
    expected = torch.cartesian_prod(*(torch.arange(size) for size in axes)).view(total, len(axes))
    digits = FactorizedPositions(axes, 1).digits(torch.arange(total))
    assert torch.equal(torch.stack(digits, dim=-1), expected)


def test_an_image_byte_gets_its_row_column_and_channel():
    positions = FactorizedPositions((32, 32, 3), 4)
    byte = (17 * 32 + 9) * 3 + 2
    assert [digit.item() for digit in positions.digits(torch.tensor(byte))] == [17, 9, 2]
    row, column, channel = positions.weight[17], positions.weight[32 + 9], positions.weight[64 + 2]
    torch.testing.assert_close(positions(torch.tensor(byte)), row + column + channel)


def test_embedding_is_the_sum_of_one_row_an_axis_and_trains_each():
    positions = FactorizedPositions((4, 5), 3)
    embedded = positions(torch.arange(20))
    expected = positions.weight[:4].repeat_interleave(5, dim=0) + positions.weight[4:].repeat(4, 1)
    torch.testing.assert_close(embedded, expected)
    embedded.sum().backward()
    assert positions.weight.grad.tolist() == [[5.0] * 3] * 4 + [[4.0] * 3] * 5


def test_one_axis_is_a_plain_table():
    positions = FactorizedPositions((6,), 2)
    assert torch.equal(positions(torch.tensor([[5, 0]])), positions.weight[[5, 0]][None])


def test_a_position_past_the_axes_fails_instead_of_wrapping():
    with pytest.raises(IndexError):
        FactorizedPositions((2, 3), 4)(torch.tensor([6]))


@pytest.mark.parametrize(
    ("max_positions", "stride", "axes"),
    [
        (12288, 128, (96, 128)),
        (1000, 128, (8, 128)),
        (100, None, (10, 10)),
        (101, None, (10, 11)),
        (1, None, (1, 1)),
        (64, 128, (1, 64)),
    ],
)
def test_default_axes(max_positions, stride, axes):
    assert default_axes(max_positions, stride) == axes
    assert axes[0] * axes[1] >= max_positions > (axes[0] - 1) * axes[1]


@pytest.mark.parametrize("axes", [(), (3, 0)])
def test_bad_axes(axes):
    with pytest.raises(ArgumentError, match="at least one axis, each of size 1 or more"):
        FactorizedPositions(axes, 4)


@pytest.mark.parametrize("axes", [(30,), (5, 7), (4, 3, 3), (3, 1, 5)])
def test_the_first_positions_need_no_look_up(axes):
    positions = FactorizedPositions(axes, 6).double()
    total = torch.tensor(axes).prod().item()
    for length in (1, 4, total - 1, total):
        weight = torch.randn(length, 6, dtype=torch.float64)
        first, looked_up = positions.first(length), positions(torch.arange(length))
        assert torch.equal(first, looked_up)
        (got,), (wanted,) = (torch.autograd.grad((x * weight).sum(), positions.weight) for x in (first, looked_up))
        torch.testing.assert_close(got, wanted)


def test_more_positions_than_the_axes_hold():
    with pytest.raises(ArgumentError, match=r"7 positions: axes=\(2, 3\) hold 6"):
        FactorizedPositions((2, 3), 4).first(7)
