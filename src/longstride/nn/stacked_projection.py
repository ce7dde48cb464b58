"""Several linear maps of one input as a single one."""

from collections.abc import Sequence

from torch import nn


class StackedProjection(nn.Linear):
    """x -> (W_1 x, W_2 x, ...) without biases, one behind the other, so that x is read once; [..., d] to [..., sum].

    ``weight.split(widths)`` are the maps' own weights: what treats a matrix as a whole, as Muon does, must take them
    one by one.

    Args:
        hidden_size: d.
        widths: of the maps' outputs.
    """

    def __init__(self, hidden_size: int, widths: Sequence[int]) -> None:
        super().__init__(hidden_size, sum(widths), bias=False)
        self.widths = tuple(widths)
