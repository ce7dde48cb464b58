"""A model whose weights are set by hand, so that what it finds is known exactly."""

from dataclasses import dataclass

import torch

from longstride import Pattern
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM

CONTEXT = 64


@dataclass(frozen=True)
class OnlyPrevious(Pattern):
    """Every query reads the token before it and nothing else."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i - j == 1


def copier(pattern: str) -> SparseTransformerForCausalLM:
    """Goes on as it went on when the last byte stood in the text before: an induction head, made by hand.

    Every byte has two dimensions: "I am it" and "it stands before me". The first layer writes the second of them. In
    the second, which attends along ``pattern``, a query that is x meets keys that x stands before, and copies them.
    """
    config = SparseTransformerConfig(
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
        patterns=[OnlyPrevious(), pattern],
        intermediate_size=1,
    )
    model = SparseTransformerForCausalLM(config).eval()
    one_for_each = torch.eye(256)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :256] = one_for_each
        previous, copying = (layer.attention for layer in model.model.layers)
        # Rows 0 to 511 make queries, then 512 keys, then 512 values.
        previous.qkv_proj.weight[1024:1280, :256] = one_for_each
        previous.out_proj.weight[256:, :256] = 0.05 * one_for_each
        copying.qkv_proj.weight[:256, :256] = 3 * one_for_each
        copying.qkv_proj.weight[512:768, 256:] = 3 * one_for_each
        copying.qkv_proj.weight[1024:1280, :256] = one_for_each
        copying.out_proj.weight[:256, :256] = one_for_each
        model.lm_head.weight[:, :256] = one_for_each
    return model
