"""Learned position embeddings, factorised over axes: one small table an axis instead of one large table."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longstride.errors import ArgumentError


def default_axes(max_positions: int, stride: int | None = None) -> tuple[int, int]:
    """Rows and columns of the matrix that holds ``max_positions`` positions: (ceil(max_positions / stride), stride).

    Args:
        max_positions: the number of positions to cover, at least 1.
        stride: the columns; the attention pattern's stride, so that a column is what strided attention reads
            (Child et al. 2019, section 5.3). Without one, ceil(sqrt(max_positions)).

    >>> default_axes(12288, 128)
    (96, 128)
    >>> default_axes(1000)
    (32, 32)
    """
    columns = math.isqrt(max_positions - 1) + 1 if stride is None else min(stride, max_positions)
    return -(-max_positions // columns), columns


class FactorizedPositions(nn.Module):
    """embedding(p) = sum over axes a of W_a[digit_a(p)], the digits being those of p in the mixed radix ``axes``.

    The last axis is the fastest. ``axes=(96, 128)`` gives every position its row and column in a matrix of width 128;
    ``axes=(32, 32, 3)`` gives row, column and channel of an image's bytes in raster order; one axis is a plain table.

    Args:
        axes: size of each axis, slowest first; their product bounds the positions.
        hidden_size: width of the embeddings.

    Source: Child et al. 2019, section 5.3.
    """

    def __init__(self, axes: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        if not axes or min(axes) < 1:
            raise ArgumentError(f"axes={tuple(axes)}: give at least one axis, each of size 1 or more")
        self.axes = tuple(axes)
        self.hidden_size = hidden_size
        # One parameter for all the axes: float[sum(axes), hidden_size], axis after axis.
        self.weight = nn.Parameter(torch.empty(sum(self.axes), hidden_size))
        nn.init.normal_(self.weight)

    def digits(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The positions' digits, one integer tensor of the positions' shape an axis, slowest axis first."""
        digits = []
        for size in reversed(self.axes[1:]):
            digits.append(positions % size)
            positions = positions // size
        # The slowest digit is not reduced: a position past the axes' product fails in the table, it does not wrap.
        return (positions, *reversed(digits))

    def forward(self, positions: Tensor) -> Tensor:
        """Embed positions: int[...], 0 <= p < product of the axes, to float[..., hidden_size]."""
        tables = self.weight.split(self.axes)
        embedded = [F.embedding(digit, table) for digit, table in zip(self.digits(positions), tables, strict=True)]
        return sum(embedded[1:], start=embedded[0])

    def first(self, length: int) -> Tensor:
        """Embed the positions 0 ... length - 1: float[length, hidden_size], as `forward` does, without look-ups.

        The tables lie along the axes of a grid, so that their gradients are sums over it; those of look-ups are sorted.

        Raises:
            ArgumentError: the axes hold fewer positions.
        """
        fastest = math.prod(self.axes[1:])
        if length < fastest:  # most of the grid would be for nothing
            return self(torch.arange(length, device=self.weight.device))
        slowest = -(-length // fastest)
        if slowest > self.axes[0]:
            raise ArgumentError(f"{length} positions: axes={self.axes} hold {math.prod(self.axes)}")
        grid, tables = (slowest, *self.axes[1:]), list(self.weight.split(self.axes))
        tables[0] = tables[0][:slowest]
        along = [
            table.view(*(size if axis == own else 1 for axis, size in enumerate(grid)), self.hidden_size)
            for own, table in enumerate(tables)
        ]
        return sum(along[1:], start=along[0]).view(-1, self.hidden_size)[:length]

    def extra_repr(self) -> str:
        return f"axes={self.axes}, hidden_size={self.hidden_size}"
