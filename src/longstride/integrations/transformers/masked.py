"""A step whose rows stand irregularly: the pattern's mask over the keys that there are, and PyTorch's own attention.

Decoding with the caches of transformers comes here where rows are padded, where a sliding-window cache has forgotten
keys, and where a compiled step knows its position on the device alone. It costs q_len x kv_len, which for one new
token is what reading the cache costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longstride.errors import ArgumentError
from longstride.integrations.transformers.placement import Facts
from longstride.integrations.transformers.saved import head_rules, pattern_of


def masked_attention(q: Tensor, k: Tensor, v: Tensor, text: str, facts: Facts, scale: float | None) -> Tensor:
    """Attention of q [batch, heads, q_len, head_dim] to k and v [batch, kv_heads, kv_len, ...], at their `facts`.

    Positions count a row's real tokens from its first one. Queries at padding get 0.

    Raises:
        ArgumentError: the pattern reads keys that a sliding-window cache has forgotten.
    """
    first = facts.q_offset if facts.device_offset is None else facts.device_offset
    assert first is not None
    q_slot = first + torch.arange(facts.q_len, device=q.device)
    kv_slot = facts.kv_offset + torch.arange(k.shape[2], device=q.device)
    if facts.real is None:
        # A StaticCache has room behind the last token, and further than the table of a BlockSparse may reach.
        i, j = q_slot[None], kv_slot[None].minimum(q_slot[-1])
        there = (kv_slot <= q_slot[-1])[None, None, None]
    else:
        position = facts.real.cumsum(1) - 1
        i, j = position[:, q_slot], position[:, kv_slot]
        there = facts.real[:, kv_slot][:, None, None]
    if facts.kv_offset and not torch.compiler.is_compiling():
        _refuse_forgotten(text, facts)
    rules = head_rules(text, q.shape[1])
    # Of the shape [batch or 1, heads or 1, q_len, kv_len], so that rows and heads that agree share a mask.
    allowed = torch.cat([rule.allows(i[:, None, :, None], j[:, None, None, :]) for rule in rules], 1) & there
    nothing = ~allowed.any(-1, keepdim=True)
    # A row without keys would be NaN, also in the gradients: it reads all, and what it read is dropped.
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed | nothing, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.masked_fill(nothing, 0.0)


def _refuse_forgotten(text: str, facts: Facts) -> None:
    """Raise where a new token, or one that follows, may read a key before the first one that is kept."""
    assert facts.q_offset is not None
    rows = [(facts.q_offset, facts.kv_offset)]  # tokens before the new ones, and how many of them are forgotten
    if facts.real is not None:
        before = (facts.real[:, :slot].sum(1).tolist() for slot in rows[0])
        rows = list(zip(*before, strict=True))
    for seen, forgotten in set(rows):
        if forgotten and bool(pattern_of(text).retained(seen)[..., :forgotten].any()):
            raise ArgumentError(
                f"{text} reads keys that this model's sliding-window cache has forgotten: pass "
                "past_key_values=SparsifiedCache(model.config, capacity), which keeps what the pattern reads, or a "
                "DynamicCache() that was made without the model's config"
            )
