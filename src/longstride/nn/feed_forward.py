"""The position-wise feed-forward network of the residual block."""

import torch
from torch import Tensor, nn

from longstride.nn.initialization import ResidualProjection


def sigmoid_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that the paper uses (Child et al. 2019, section 5.2)."""
    return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """W_2 f(W_1 x + b_1) + b_2 with f = :func:`sigmoid_gelu`; [..., hidden_size] to the same shape.

    Args:
        hidden_size: width of the model.
        intermediate_size: width between the two maps; 4 * hidden_size in the paper, 2 * where it is "half-size".
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = ResidualProjection(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(sigmoid_gelu(self.up_proj(hidden)))
