import torch

from longstride.nn import StackedProjection


def test_maps_stand_one_behind_the_other_and_are_the_parts_of_the_weight():
    stacked = StackedProjection(4, [2, 3, 1]).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    parts = stacked(x).split(stacked.widths, -1)
    for part, weight in zip(parts, stacked.weight.split(stacked.widths), strict=True):
        torch.testing.assert_close(part, x @ weight.T)
    assert stacked.bias is None
