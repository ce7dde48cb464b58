"""New tokens of padded rows after those of a cache: every row brought to its own positions, and then one sequence."""

from __future__ import annotations

from torch import Tensor

from longstride.attention import attention
from longstride.integrations.transformers.placement import Facts
from longstride.patterns import Pattern


def aligned_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, facts: Facts, scale: float | None, backend: str | None
) -> Tensor:
    """Attention of q [batch, heads, q_len, head_dim] to k and v [batch, kv_heads, kv_len, ...], at their `facts`.

    Real tokens move to the front of their row, where the pattern, which is causal, sees none of what lies behind them.
    The queries of all rows are then those of the positions from the least to the greatest, so it pays where rows are
    about equally long. Queries at padding get 0.
    """
    assert facts.real is not None
    assert facts.q_offset is not None
    slots, first, end = facts.slots
    keys, values = (_taken(x, slots[:, :end]) for x in (k, v))
    queries = _taken(q, (slots[:, first:end] - facts.q_offset).clamp(0, facts.q_len - 1))
    out = attention(queries, keys, values, pattern, scale=scale, backend=backend)
    assert isinstance(out, Tensor)  # a pair comes with return_lse alone
    new = slice(facts.q_offset, facts.q_offset + facts.q_len)
    back = (facts.real.cumsum(1)[:, new] - 1 - first).clamp(min=0)
    return _taken(out, back).masked_fill(~facts.real[:, None, new, None], 0.0)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """x [batch, heads, length, dim] at places int64 [batch, n]."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
