"""A residual block of today's language models, beside the paper's: RMSNorm, rotary positions, SwiGLU, QK-norm."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longstride.nn.initialization import ResidualProjection


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
        # W_1 and W_2 as one map: x is read once.
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = ResidualProjection(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ModernBlock(nn.Module):
    """A pre-norm residual block with RMSNorm; [B, T, d] to [B, T, d].

    ::

        h = H + dropout(attention(norm(H)))
        h + dropout(feed_forward(norm(h)))

    Args:
        attention: maps [B, T, d] to [B, T, d]; usually a :class:`longstride.nn.RotarySelfAttention`.
        feed_forward: maps [B, T, d] to [B, T, d]; usually a :class:`GatedFeedForward`.
        hidden_size: d.
        dropout: probability that an element of a branch is dropped in training.
        norm_eps: added to the mean square in the norms.

    Source: Touvron 2023 (Llama), section 2.2; Zhang 2019 (RMSNorm), equation 4.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        hidden_size: int,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, **for_attention: Any) -> Tensor:
        """The block; what else is given goes to the attention: the rotation of the positions, and its cache."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), **for_attention))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
