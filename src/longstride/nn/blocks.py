"""Residual blocks: how attention and feed-forward are added to the residual stream."""

from typing import Any, ClassVar

from torch import Tensor, nn

from longstride.nn.self_attention import KeysValues


class PreNormBlock(nn.Module):
    """A residual block whose branches begin with a norm, of the kind that a subclass names; [B, T, d] to [B, T, d].

    ::

        a(H) = dropout(attention(norm(H)))
        b(H) = dropout(feed_forward(norm(H + a(H))))
        H + a(H) + b(H)

    Dropout falls on the two additions and nowhere else.

    Args:
        attention: maps [B, T, d] to [B, T, d].
        feed_forward: maps [B, T, d] to [B, T, d].
        hidden_size: d.
        dropout: probability that an element of a branch is dropped in training.
        norm_eps: added to the variance, or to the mean square, in the norms.
    """

    #: Made of a width and an ``eps``.
    norm: ClassVar[type[nn.Module]]

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
        self.attention_norm = self.norm(hidden_size, eps=norm_eps)
        self.attention = attention
        self.feed_forward_norm = self.norm(hidden_size, eps=norm_eps)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, **for_attention: Any) -> Tensor | tuple[Tensor, KeysValues]:
        """The block; what else is given goes to the attention: its cache, the rotation of the positions.

        With ``earlier`` segments, the attention's keys and values come out beside the block's output.
        """
        attended = self.attention(self.attention_norm(hidden), **for_attention)
        attended, carried = attended if isinstance(attended, tuple) else (attended, None)
        hidden = hidden + self.dropout(attended)
        hidden = hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        return hidden if carried is None else (hidden, carried)


class ResidualBlock(PreNormBlock):
    """The paper's block, with layer norm.

    Source: Child et al. 2019, section 5.2.
    """

    norm = nn.LayerNorm
