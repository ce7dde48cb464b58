"""A residual block of today's language models, beside the paper's: RMSNorm, rotary positions, SwiGLU, QK-norm."""

import torch.nn.functional as F
from torch import Tensor, nn

from longstride.nn.blocks import PreNormBlock
from longstride.nn.initialization import ResidualProjection
from longstride.nn.stacked_projection import StackedProjection


class GatedFeedForward(nn.Module):
    """W_3 (silu(W_1 x) * W_2 x), without biases: SwiGLU; [..., hidden_size] to the same shape.

    Args:
        hidden_size: width of the model.
        intermediate_size: width between the maps. Three maps of 8/3 * hidden_size have as many weights as the plain
            network's two of 4 * hidden_size.

    Source: Shazeer 2020, equation 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = StackedProjection(hidden_size, (intermediate_size, intermediate_size))  # W_1 and W_2
        self.down_proj = ResidualProjection(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ModernBlock(PreNormBlock):
    """A block with RMSNorm, usually of a :class:`longstride.nn.RotarySelfAttention` and a :class:`GatedFeedForward`.

    Source: Touvron 2023 (Llama), section 2.2; Zhang 2019 (RMSNorm), equation 4.
    """

    norm = nn.RMSNorm
