"""The residual blocks of a configuration, as layers that transformers can checkpoint.

``config.block`` names the kind: ``"sparse_transformer"`` is the paper's, with learned position embeddings added to the
tokens'; ``"modern"`` has RMSNorm, SwiGLU, and normalised queries and keys that are rotated by their positions. Where
the patterns look ahead, the blocks are an encoder's: the same, with attention that keeps to each row's real tokens.
"""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longstride.models.configuration import SparseTransformerConfig
from longstride.models.schedule import layer_patterns
from longstride.nn import (
    EncoderSelfAttention,
    FeedForward,
    GatedFeedForward,
    GlobalProjections,
    ModernBlock,
    ResidualBlock,
    RotaryEncoderSelfAttention,
    RotarySelfAttention,
    SelfAttention,
)
from longstride.patterns import Pattern


class SparseTransformerBlock(GradientCheckpointingLayer, ResidualBlock):
    """The paper's block, whose activations can be recomputed in the backward pass."""


class ModernTransformerBlock(GradientCheckpointingLayer, ModernBlock):
    """The modern block, whose activations can be recomputed in the backward pass."""


def build_blocks(config: SparseTransformerConfig) -> nn.ModuleList:
    """The N residual blocks, each with its layer's pattern; an encoder's if a pattern looks ahead."""
    assert config.intermediate_size is not None
    width, eps = config.hidden_size, config.layer_norm_eps
    patterns = layer_patterns(config)
    looks_ahead = not all(pattern.is_causal for pattern in patterns)
    blocks = nn.ModuleList()
    for pattern in patterns:
        attention = _attention(config, pattern, looks_ahead)
        if config.block == "modern":
            feed_forward = GatedFeedForward(width, config.intermediate_size)
            block = ModernTransformerBlock
        else:
            feed_forward = FeedForward(width, config.intermediate_size)
            block = SparseTransformerBlock
        blocks.append(block(attention, feed_forward, hidden_size=width, dropout=config.dropout, norm_eps=eps))
    return blocks


def _attention(config: SparseTransformerConfig, pattern: Pattern, looks_ahead: bool) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "qk_hidden_size": config.qk_hidden_size,
    }
    options: dict[str, Any] = {**sizes, "backend": config.attention_backend}
    if config.block == "modern":
        options["norm_eps"] = config.layer_norm_eps
    if not looks_ahead:
        return (RotarySelfAttention if config.block == "modern" else SelfAttention)(pattern, **options)
    if config.global_projections == "separate":
        options["global_projections"] = GlobalProjections(pattern, **sizes)
    return (RotaryEncoderSelfAttention if config.block == "modern" else EncoderSelfAttention)(pattern, **options)


def last_norm(config: SparseTransformerConfig) -> nn.Module:
    """The norm after the last block, of the same kind as the blocks' own."""
    block = ModernBlock if config.block == "modern" else ResidualBlock
    return block.norm(config.hidden_size, eps=config.layer_norm_eps)
