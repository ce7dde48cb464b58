"""Building blocks of sparse Transformers: attention layer, feed-forward, residual block, positions, initialisation."""

from longstride.nn.blocks import ResidualBlock
from longstride.nn.feed_forward import FeedForward, sigmoid_gelu
from longstride.nn.initialization import LogitsProjection, ResidualProjection, initialize_
from longstride.nn.positions import FactorizedPositions, default_axes
from longstride.nn.self_attention import SelfAttention
from longstride.nn.token_loss import chunk_tokens, summed_token_loss

__all__ = [
    "FactorizedPositions",
    "FeedForward",
    "LogitsProjection",
    "ResidualBlock",
    "ResidualProjection",
    "SelfAttention",
    "chunk_tokens",
    "default_axes",
    "initialize_",
    "sigmoid_gelu",
    "summed_token_loss",
]
