"""The residual blocks of a configuration, as layers that transformers can checkpoint.

``config.block`` names the kind: ``"sparse_transformer"`` is the paper's, with learned position embeddings added to the
tokens'; ``"modern"`` has RMSNorm, SwiGLU, and normalised queries and keys that are rotated by their positions.
"""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longstride.models.configuration import SparseTransformerConfig
from longstride.models.schedule import layer_patterns
from longstride.nn import FeedForward, GatedFeedForward, ModernBlock, ResidualBlock, RotarySelfAttention, SelfAttention


class SparseTransformerBlock(GradientCheckpointingLayer, ResidualBlock):
    """The paper's block, whose activations can be recomputed in the backward pass."""


class ModernTransformerBlock(GradientCheckpointingLayer, ModernBlock):
    """The modern block, whose activations can be recomputed in the backward pass."""


def build_blocks(config: SparseTransformerConfig) -> nn.ModuleList:
    """The N residual blocks, each with its layer's pattern."""
    assert config.intermediate_size is not None
    width, eps = config.hidden_size, config.layer_norm_eps
    blocks = nn.ModuleList()
    for pattern in layer_patterns(config):
        if config.block == "modern":
            attention = RotarySelfAttention(
                pattern,
                hidden_size=width,
                num_heads=config.num_attention_heads,
                qk_hidden_size=config.qk_hidden_size,
                norm_eps=eps,
                backend=config.attention_backend,
            )
            feed_forward = GatedFeedForward(width, config.intermediate_size)
            block = ModernTransformerBlock
        else:
            attention = SelfAttention(
                pattern,
                hidden_size=width,
                num_heads=config.num_attention_heads,
                qk_hidden_size=config.qk_hidden_size,
                backend=config.attention_backend,
            )
            feed_forward = FeedForward(width, config.intermediate_size)
            block = SparseTransformerBlock
        blocks.append(block(attention, feed_forward, hidden_size=width, dropout=config.dropout, norm_eps=eps))
    return blocks


def last_norm(config: SparseTransformerConfig) -> nn.Module:
    """The norm after the last block, of the same kind as the blocks' own."""
    block = ModernBlock if config.block == "modern" else ResidualBlock
    return block.norm(config.hidden_size, eps=config.layer_norm_eps)
