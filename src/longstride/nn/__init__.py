"""Building blocks of sparse Transformers: attention, feed-forward, residual blocks, positions, initialisation, loss."""

from longstride.nn.blocks import ResidualBlock
from longstride.nn.encoder_attention import EncoderSelfAttention, RotaryEncoderSelfAttention, real_documents
from longstride.nn.feed_forward import FeedForward, sigmoid_gelu
from longstride.nn.global_projections import GlobalProjections, global_tokens
from longstride.nn.initialization import LogitsProjection, ResidualProjection, initialize_
from longstride.nn.modern_block import GatedFeedForward, ModernBlock
from longstride.nn.positions import FactorizedPositions, default_axes
from longstride.nn.rotary import RotaryPositions, RotarySelfAttention, rotate
from longstride.nn.self_attention import Documents, Earlier, KeysValues, SelfAttention
from longstride.nn.stacked_projection import StackedProjection
from longstride.nn.token_loss import chunk_loss, chunk_tokens, summed_token_loss

__all__ = [
    "Documents",
    "Earlier",
    "EncoderSelfAttention",
    "FactorizedPositions",
    "FeedForward",
    "GatedFeedForward",
    "GlobalProjections",
    "KeysValues",
    "LogitsProjection",
    "ModernBlock",
    "ResidualBlock",
    "ResidualProjection",
    "RotaryEncoderSelfAttention",
    "RotaryPositions",
    "RotarySelfAttention",
    "SelfAttention",
    "StackedProjection",
    "chunk_loss",
    "chunk_tokens",
    "default_axes",
    "global_tokens",
    "initialize_",
    "real_documents",
    "rotate",
    "sigmoid_gelu",
    "summed_token_loss",
]
