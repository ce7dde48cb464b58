"""The attention function that is registered with transformers: every layer of a sparsified model calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from longstride.attention import attention
from longstride.attention_varlen import attention_varlen
from longstride.errors import ArgumentError, UnsupportedError
from longstride.integrations.transformers.aligned import aligned_attention
from longstride.integrations.transformers.cache import HeldKeys
from longstride.integrations.transformers.masked import masked_attention
from longstride.integrations.transformers.placement import Facts, Placement, check
from longstride.integrations.transformers.saved import head_rules, layer_text, looks_ahead, pattern_of

#: What some models give their attention besides queries and keys, and patterns have no place for.
_OTHER_MATHEMATICS = {
    "softcap": "scores that are capped (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "position_bias": "a bias that is added to the scores (position_bias)",
    "indices": "keys that the model selects itself (indices)",
    "block_indices": "keys that the model selects itself (block_indices)",
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer along its pattern.

    Args:
        module: the layer; its ``config`` has the patterns and its ``layer_idx`` says which is its own.
        query: [batch, heads, q_len, head_dim].
        key, value: [batch, kv_heads, kv_len, ...], as the cache returns them, not repeated.
        attention_mask: the `Placement` of the batch.
        dropout: of attention weights; must be 0.
        scaling: factor of the scores; 1 / sqrt(head_dim) when not given.
        kwargs: what else the model passes to its layers.

    Returns:
        out [batch, q_len, heads, v_head_dim], and None for the weights, which are never formed.

    Raises:
        UnsupportedError, ArgumentError: what a pattern cannot do; each says which and what to do.
    """
    _refuse_other_mathematics(dropout, kwargs)
    config: Any = module.config
    text = layer_text(config, getattr(module, "layer_idx", None))
    backend = config.longstride.get("backend")
    facts = _facts(module, query, key, attention_mask)
    packed = _told_documents(facts, key, kwargs)
    if getattr(module, "layer_idx", None) == 0 and packed is None:
        _refuse_packing_unseen(facts, kwargs.get("position_ids"))
    _refuse_a_share_of_heads(text, query.shape[1], config.num_attention_heads)
    if facts.is_causal and looks_ahead(text):
        raise UnsupportedError(
            f"{text} lets a token attend to later ones, and this model is a decoder, which predicts those: intersect "
            f"it with Causal(), as in ({text}) & Causal(), or drop its lookahead"
        )
    if isinstance(key, HeldKeys):
        out = key.cache.attend(query, key, value, pattern_of(text), facts, scaling, backend)
    else:
        out = _along(query, key, value, text, facts, scaling, backend, packed)
    return out.transpose(1, 2).contiguous(), None


def _refuse_other_mathematics(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise UnsupportedError(
            f"attention dropout of {dropout}: sparse attention never forms the weights that it would drop; set the "
            "config's attention dropout (attention_dropout, attn_pdrop, attention_probs_dropout_prob) to 0 before the "
            "model is built, as in from_pretrained(path, attention_dropout=0.0)"
        )
    for name, what in _OTHER_MATHEMATICS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"this model has {what}, which sparse attention does not compute: keep it dense")
    if kwargs.get("output_attentions") or _weights_are_collected():
        raise UnsupportedError(
            "sparse attention never forms its weights, so output_attentions=True has nothing to return: leave it out, "
            "and see pattern.mask(length) for what attends to what"
        )


def _weights_are_collected() -> bool:
    """Whether transformers is collecting attention weights of this call: not every layer is told."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return "attentions" in (collector.get() or {})


def _facts(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Facts:
    facts = attention_mask.facts if isinstance(attention_mask, Placement) else None
    if facts is not None:
        if facts.q_len != query.shape[2] or (facts.kv_len != key.shape[2] and not isinstance(key, HeldKeys)):
            raise ArgumentError(
                f"{query.shape[2]} queries and {key.shape[2]} keys where the model announced {facts.q_len} and "
                f"{facts.kv_len}: its layers change them in between, or attend across; keep its attention dense"
            )
        return facts
    if isinstance(attention_mask, Placement):
        raise UnsupportedError(
            "this model cuts or changes its mask on the way to its layers, and where the tokens stand is lost: keep "
            "its attention dense"
        )
    if attention_mask is not None:
        raise UnsupportedError(
            f"a mask {list(attention_mask.shape)} of {attention_mask.dtype} for every pair: what attends to what is "
            "the pattern alone; give attention_mask [batch, length], which says what is padding"
        )
    if getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            "no mask came with these tokens, so padding would be lost: this model does not make its masks by "
            "transformers.masking_utils, and its attention must stay dense"
        )
    return Facts(query.shape[2], key.shape[2], 0, None, 0, None, None, None, is_causal=False)


def _refuse_a_share_of_heads(text: str, present: int, num_heads: int) -> None:
    if present != num_heads and len(head_rules(text, num_heads)) > 1:
        raise UnsupportedError(
            f"{text} tells heads apart, and this layer has {present} of {num_heads}, as under tensor parallelism: give "
            "all heads one pattern"
        )


def _told_documents(facts: Facts, key: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
    """Offsets int [documents + 1] of packed documents and the longest one's tokens, where the caller gives them."""
    offsets, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if offsets is None:
        return None
    if longest is None:
        raise ArgumentError("cu_seq_lens_q without max_length_q: also pass the tokens of the longest document")
    if facts.real is not None or facts.q_offset != 0 or isinstance(key, HeldKeys):
        raise ArgumentError(
            "cu_seq_lens_q packs documents in rows without padding that are computed at once: leave attention_mask "
            "out and pass use_cache=False"
        )
    return offsets, int(longest)


def _refuse_packing_unseen(facts: Facts, position_ids: Tensor | None) -> None:
    """transformers looks for packed documents only where there is no cache, and most models make one by themselves."""
    if torch.compiler.is_compiling() or facts.q_offset != 0 or position_ids is None or position_ids.dim() != 2:
        return
    if facts.real is None and facts.documents is not None:
        return
    again = position_ids.diff() != 1
    if facts.real is not None:  # what stands at padding does not matter
        real = facts.real[:, : facts.q_len]
        again = again & real[:, 1:] & real[:, :-1]
    if again.any():
        raise ArgumentError(
            "position_ids begin again within a row, which transformers takes for packed documents in decoders alone, "
            "and only where there is neither a mask nor a cache: leave attention_mask out and pass use_cache=False, "
            "or also pass cu_seq_lens_q and max_length_q, which say where documents begin"
        )


def _along(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: str,
    facts: Facts,
    scale: float | None,
    backend: str | None,
    packed: tuple[Tensor, int] | None,
) -> Tensor:
    """Attention to dense keys: whole sequences, documents, or new tokens after those of a cache."""
    pattern = pattern_of(text)
    if facts.kv_offset > 0 or (facts.device_offset is not None and torch.compiler.is_compiling()):
        if backend is not None:
            raise UnsupportedError(
                f"backend={backend!r}: after a sliding-window cache, and in a compiled step after a StaticCache, new "
                "tokens are computed by PyTorch's masked attention; leave backend out, or pass past_key_values="
                "SparsifiedCache(model.config, capacity)"
            )
        return masked_attention(q, k, v, text, facts, scale)
    if facts.real is not None and facts.documents is None:
        # A single token costs less without moving the keys.
        if facts.q_len > 1 or backend is not None:
            return aligned_attention(q, k, v, pattern, facts, scale, backend)
        return masked_attention(q, k, v, text, facts, scale)
    assert facts.q_offset is not None
    # A StaticCache has room behind the tokens that are there.
    there = facts.q_offset + facts.q_len
    k, v = k[:, :, :there], v[:, :, :there]
    documents, longest = facts.documents, facts.q_len
    if documents is None and packed is not None:
        documents, longest = packed
    elif facts.restarts is not None:
        check(
            ~facts.restarts[:, 1:].any(),
            "packed position_ids in a compiled model: also pass cu_seq_lens_q and max_length_q, as "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does, which say where documents begin",
        )
    if documents is None:
        out = attention(q, k, v, pattern, scale=scale, backend=backend)
        assert isinstance(out, Tensor)  # a pair comes with return_lse alone
        return out
    batch = q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = attention_varlen(q, k, v, documents, pattern, scale=scale, backend=backend, max_seqlen=longest)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, -1)).transpose(1, 2)
