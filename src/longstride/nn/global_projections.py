"""Projections of their own for the tokens that read everything: Longformer's global attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longstride.errors import PatternError
from longstride.nn.stacked_projection import StackedProjection
from longstride.patterns import Global, Pattern, Union


def global_tokens(pattern: Pattern) -> tuple[int, ...]:
    """The positions that a pattern lets read every key and be read by every query, ascending.

    >>> import longstride as ls
    >>> global_tokens(ls.Local(9, lookahead=8) | ls.Global(2, causal=False) | ls.Global((7,), causal=False))
    (0, 1, 7)

    Raises:
        PatternError: there is no ``Global(..., causal=False)`` in it, alone or as a member of a union.
    """
    members = pattern.patterns if isinstance(pattern, Union) else (pattern,)
    found = {place for p in members if isinstance(p, Global) and not p.causal for place in p.positions()}
    if not found:
        raise PatternError(
            f"{pattern}: separate global projections are those of global tokens, and this pattern names none; join "
            "one, as in Local(257, lookahead=256) | Global(1, causal=False), or share the projections"
        )
    return tuple(sorted(found))


class GlobalProjections(nn.Module):
    """Queries of the global tokens, and the keys and values that these queries read, by maps of their own.

    With T the global tokens, row t in T of the layer's output is ``softmax(q'_t k'^T / sqrt(head_dim)) v'`` with q',
    k', v' from this module. All other rows read the global tokens' keys among the layer's own, as they read any key.

    Args:
        pattern: of the layer; its ``Global(..., causal=False)`` says which tokens are global.
        hidden_size, num_heads, qk_hidden_size: as :class:`longstride.nn.SelfAttention`'s.

    Raises:
        PatternError: the pattern has no global tokens.

    Source: Beltagy 2020 (Longformer), section 3.1, linear projections for global attention.
    """

    def __init__(
        self, pattern: Pattern, *, hidden_size: int, num_heads: int, qk_hidden_size: int | None = None
    ) -> None:
        super().__init__()
        qk_hidden_size = hidden_size if qk_hidden_size is None else qk_hidden_size
        self.tokens = global_tokens(pattern)
        self.num_heads = num_heads
        self.widths = [qk_hidden_size, hidden_size]
        # Queries of a few tokens, keys and values of all: two maps.
        self.q_proj = nn.Linear(hidden_size, qk_hidden_size, bias=False)
        self.kv_proj = StackedProjection(hidden_size, self.widths)

    def index(self, length: int, device: torch.device) -> Tensor:
        """int64[n]: the global tokens of a sequence of that length."""
        there = [token for token in self.tokens if token < length]
        if there == list(range(len(there))):
            return torch.arange(len(there), device=device)  # made on the device
        return torch.tensor(there, device=device)

    def forward(self, hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries float[batch, heads, n, head_dim] of the tokens ``index``, int64[n]; keys and values of all tokens."""
        q = self.q_proj(hidden.index_select(1, index))
        k, v = self.kv_proj(hidden).split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def overwrite(
        self, attended: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor | None
    ) -> Tensor:
        """``attended`` with the global tokens' rows replaced by their own attention.

        Args:
            attended: float[batch, heads, length, v_head_dim], of the layer's own projections.
            q, k, v: what `forward` returned, its queries and keys placed as the layer places its own.
            index: int64[n]: the rows to replace.
            counts: int64[batch]: how many of a row's tokens are real, the first ones; None where all are.
        """
        length = attended.shape[2]
        real = None
        if counts is not None:
            # A row of padding has nothing to read; its first token stands in, so that no softmax is over nothing.
            real = torch.arange(length, device=q.device) < counts.to(q.device).clamp(min=1)[:, None]
            real = real[:, None, None]  # [batch, 1, 1, length]
        rows = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        # Token by token, as it lies in memory and as its gradient comes: PyTorch 2.11 compiles no other order.
        by_token, rows = attended.transpose(1, 2), rows.transpose(1, 2).to(attended.dtype)
        return by_token.index_copy(1, index, rows).transpose(1, 2)

    def extra_repr(self) -> str:
        shown = ", ".join(map(str, self.tokens[:8])) + (", ..." if len(self.tokens) > 8 else "")
        return f"tokens=({shown}), num_heads={self.num_heads}"
