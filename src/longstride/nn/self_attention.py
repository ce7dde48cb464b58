"""Multi-head self-attention along a pattern: within a sequence, or also with what came before it or beside it.

What a layer attends to besides its own tokens is one of three things, and the other two are then left out: a cache of
earlier tokens (generation), the keys and values of earlier segments (`Earlier`, training by segments), or nothing, in
rows that hold several documents (`Documents`, packed training).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longstride.attention import BACKENDS, attention, attention_stacked
from longstride.attention_cached import attention_cached
from longstride.attention_varlen import attention_varlen
from longstride.backends.layout import heads_of
from longstride.cache import PatternCache
from longstride.errors import ArgumentError
from longstride.nn.initialization import ResidualProjection
from longstride.nn.stacked_projection import StackedProjection
from longstride.patterns import Pattern

#: A layer's keys [batch, num_heads, length, head_dim] and values [batch, num_heads, length, v_head_dim].
KeysValues = tuple[Tensor, Tensor]


class Earlier(NamedTuple):
    """What a layer reads of the segments before the present one; without gradients.

    Args:
        keys_values: of the tokens right before the segment; None at the beginning of a text. The pattern counts from
            the first of them, so it must repeat there (`Pattern.repeats_every`).
        lengths: int64[batch]: how many of these tokens each row has, the last ones, where rows began at different
            times; None where all have all.
    """

    keys_values: KeysValues | None = None
    lengths: Tensor | None = None


class Documents(NamedTuple):
    """Documents that lie one after another in the rows of a batch, which are read as one row.

    Args:
        cu_seqlens: int32 or int64[documents + 1], as `longstride.attention_varlen` takes it: document n is the tokens
            cu_seqlens[n] to cu_seqlens[n + 1] - 1 of the flattened batch.
        max_seqlen: the tokens of the longest, or more.
    """

    cu_seqlens: Tensor
    max_seqlen: int


class PatternAttention(nn.Module):
    """What self-attention layers share: the maps to heads and back, and attention along a pattern between them.

    The maps have no biases, as in equations 4 and 5 of the paper. Queries, keys and values come from one linear map
    and are read where it wrote them: the heads are views of its output.

    Args:
        pattern: which pairs attend; one for all heads or ``per_head(...)``.
        hidden_size: model width d; the values have it in all heads together.
        num_heads: number of heads; must divide hidden_size and qk_hidden_size.
        qk_hidden_size: width of the queries, and of the keys, in all heads together; hidden_size unless given
            (the paper's image models use half of it).
        backend: name of the attention backend; None takes the fastest that supports the request.

    Raises:
        ArgumentError: num_heads does not divide a width, or the backend's name is unknown.

    Source: Child et al. 2019, sections 4.2 and 5.1; section 6 for the half-size queries and keys.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        hidden_size: int,
        num_heads: int,
        qk_hidden_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        qk_hidden_size = hidden_size if qk_hidden_size is None else qk_hidden_size
        for name, width in (("hidden_size", hidden_size), ("qk_hidden_size", qk_hidden_size)):
            if width % num_heads:
                raise ArgumentError(
                    f"{name}={width} is not divisible by num_heads={num_heads}: take a multiple of {num_heads}"
                )
        if backend is not None and backend not in BACKENDS:
            raise ArgumentError(
                f"backend={backend!r}: known backends are {', '.join(map(repr, BACKENDS))}; None chooses by itself"
            )
        self.pattern = pattern
        self.num_heads = num_heads
        self.backend = backend
        self.widths = [qk_hidden_size, qk_hidden_size, hidden_size]
        self.qkv_proj = StackedProjection(hidden_size, self.widths)
        self.out_proj = ResidualProjection(hidden_size, hidden_size, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float[batch, num_heads, length, head_dim] of hidden[batch, length, hidden_size]."""
        return heads_of(self.qkv_proj(hidden), self.num_heads, self.widths[0])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cache: PatternCache | None = None,
        layer: int = 0,
        counts: Tensor | None = None,
        earlier: Earlier | None = None,
        documents: Documents | None = None,
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """The layer's output of projected tokens.

        Args:
            q, k, v: as `project` gives them.
            cache: what is kept of earlier tokens; it takes the new ones. The caller ends the step with its `advance`.
            layer: which of the cache's layers this is.
            counts: int64[batch]: with a cache, how many of each row's tokens there are, the first ones.
            earlier: keys and values of earlier segments, which are read too.
            documents: where documents begin that do not see one another.

        Returns:
            float[batch, length, hidden_size]; with ``earlier`` also the segment's own keys and values, detached, for
            the segments after it.
        """
        if cache is not None:
            attended = attention_cached(q, k, v, self.pattern, cache, layer=layer, counts=counts, backend=self.backend)
        elif earlier is not None:
            attended = self._attend_after(earlier, q, k, v)
        elif documents is not None:
            attended = self._attend_within(documents, q, k, v)
        else:
            attended = attention(q, k, v, self.pattern, backend=self.backend)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out if earlier is None else (out, (k.detach(), v.detach()))

    def _attend_after(self, earlier: Earlier, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The segment's queries over the earlier keys and its own, [batch, num_heads, length, v_head_dim]."""
        if earlier.keys_values is None:
            return attention(q, k, v, self.pattern, backend=self.backend)
        keys, values = earlier.keys_values
        held = keys.shape[2]
        k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        if earlier.lengths is None:
            return attention(q, k, v, self.pattern, backend=self.backend)
        # The queries are the last of the positions of one length, which these rows do not have. They go as packed
        # documents: of each row, what is not its own, and all that is, with queries for the earlier tokens as well.
        batch, _, total, _ = k.shape
        begins = torch.arange(batch, device=k.device) * total
        offsets = torch.stack((begins, begins + held - earlier.lengths), 1).flatten()
        documents = Documents(pad(offsets, (0, 1), value=batch * total).to(torch.int32), total)
        return self._attend_within(documents, pad(q, (0, 0, held, 0)), k, v)[:, :, held:]

    def _attend_within(self, documents: Documents, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each document by itself, [batch, num_heads, length, v_head_dim]."""
        batch, _, length, _ = q.shape
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [batch * length, num_heads, head_dim]
        attended = attention_varlen(
            *flat, documents.cu_seqlens, self.pattern, backend=self.backend, max_seqlen=documents.max_seqlen
        )
        return attended.unflatten(0, (batch, length)).transpose(1, 2)

    def extra_repr(self) -> str:
        backend = "automatic" if self.backend is None else self.backend
        return f"pattern={self.pattern}, num_heads={self.num_heads}, backend={backend}"


class SelfAttention(PatternAttention):
    """W_p attend(x, pattern): project to heads, attend along the pattern, project back; [B, T, d] to [B, T, d].

    Source: Child et al. 2019, section 5.1, equation 5.
    """

    def forward(
        self, hidden: Tensor, cache: PatternCache | None = None, **beside: Any
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """Attend within [B, T, d], and to what else is given as `attend` takes it."""
        if torch.is_grad_enabled() and cache is None and all(value is None for value in beside.values()):
            # Of three gradients the backward pass would have to make one, by a copy.
            attended = attention_stacked(
                self.qkv_proj(hidden), self.pattern, heads=self.num_heads, qk_width=self.widths[0], backend=self.backend
            )
            return self.out_proj(attended.transpose(1, 2).flatten(2))
        return self.attend(*self.project(hidden), cache=cache, **beside)
