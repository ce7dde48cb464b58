"""Models whose weights are set by hand, so that what they find is known exactly."""

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

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


def dense_copier() -> GPT2LMHeadModel:
    """The same in another architecture, where dense attention finds the previous token by its position.

    Every token has two dimensions, as above, and every position has one.
    """
    positions = slice(256, 256 + CONTEXT)
    before = slice(256 + CONTEXT, 512 + CONTEXT)
    width = 512 + CONTEXT
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=width, n_layer=2, n_head=1, n_inner=1, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    one_for_each = torch.eye(256)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        # Tied: also what the logits are read by.
        model.transformer.wte.weight[:, :256] = one_for_each
        model.transformer.wpe.weight[:, positions] = torch.eye(CONTEXT)
        previous, copying = (layer.attn for layer in model.transformer.h)
        # [in, out]; out are queries, keys and values. A query at p meets the key at p - 1.
        query, key, value = (slice(part * width, (part + 1) * width) for part in range(3))
        previous.c_attn.weight[positions, query][:, :CONTEXT] = 3 * torch.eye(CONTEXT)
        previous.c_attn.weight[positions, key][:-1, 1:CONTEXT] = 3 * torch.eye(CONTEXT - 1)
        previous.c_attn.weight[:256, value][:, :256] = one_for_each
        previous.c_proj.weight[:256, before] = 0.05 * one_for_each
        copying.c_attn.weight[:256, query][:, :256] = 3 * one_for_each
        copying.c_attn.weight[before, key][:, :256] = 3 * one_for_each
        copying.c_attn.weight[:256, value][:, :256] = one_for_each
        copying.c_proj.weight[:256, :256] = one_for_each
    return model
