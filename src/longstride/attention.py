"""The public op on batches of sequences, its form for stacked q, k and v, and `explain`: what it would do."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, overload

import torch

from longstride.backends.layout import heads_of
from longstride.backends.request import Request
from longstride.dispatch.checks import (
    autocast,
    autocast_on,
    check_tensors,
    check_types,
    no_autocast,
    refuse_tangents,
    wants_gradients,
    wants_lse_gradient,
)
from longstride.dispatch.choice import BACKENDS, both_halves, differentiable, later
from longstride.dispatch.custom_ops import batched
from longstride.dispatch.custom_ops import stacked as stacked_attention
from longstride.dispatch.explanation import Explanation, describe, explain
from longstride.errors import ArgumentError
from longstride.patterns import Pattern

__all__ = ["BACKENDS", "Explanation", "attention", "attention_stacked", "describe", "explain"]


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T * scale + log(pattern)) v``: exact attention over the pairs that `pattern` allows.

    >>> import torch, longstride as ls
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> ls.attention(q, k, v, ls.Local(8) | ls.Strided(8)).shape
    torch.Size([1, 2, 100, 16])

    Args:
        q: [batch, heads, q_len, head_dim], float16, bfloat16, float32 or float64, any strides. The queries are the
            last q_len of the kv_len positions.
        k: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads, and query head h reads key head
            h * kv_heads // heads (grouped-query attention).
        v: [batch, kv_heads, kv_len, v_head_dim].
        pattern: which pairs may attend.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        backend: one of `longstride.attention.BACKENDS` by name; the fastest that takes the request when not given. A
            backend that is named is used or refused, never replaced.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        out [batch, heads, q_len, v_head_dim] in q's dtype; with `return_lse` also lse [batch, heads, q_len] in float32
        (float64 for float64), differentiable. A query with no allowed key gets output 0, lse -inf, zero gradients.
        out lies in memory in the order of q, and gradients in that of q, k and v: where these are views of
        [batch, length, heads, head_dim], ``out.transpose(1, 2).flatten(2)`` copies nothing. With backend='reference'
        they lie as they come.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: no backend, or not the named one, takes the request.
    """
    if autocast_on(q):
        q, k, v = autocast(q, k, v)
        with no_autocast(q):
            return attention(q, k, v, pattern, scale=scale, backend=backend, return_lse=return_lse)
    chosen = _chosen(q, k, v, pattern, scale, backend, return_lse)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if chosen in BACKENDS and differentiable(chosen):
        out, lse = BACKENDS[chosen].forward(q, k, v, pattern, scale)
    else:
        out, lse = batched(q, k, v, pattern, scale, chosen, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attention_stacked(
    stacked: torch.Tensor, pattern: Pattern, *, heads: int, qk_width: int, backend: str | None = None
) -> torch.Tensor:
    """`attention` of q, k and v that lie side by side, as one projection writes them; their gradients do, too.

    Args:
        stacked: [batch, length, 2 * qk_width + v_width]: queries, keys and values, of all heads each.
        heads, qk_width: multiples of heads are qk_width and v_width.
        pattern, backend: as for `attention`.

    Returns:
        [batch, heads, length, v_width // heads], in memory as [batch, length, v_width].

    Raises:
        ArgumentError, UnsupportedError: as `attention`.
    """
    if autocast_on(stacked):
        (stacked,) = autocast(stacked)
        with no_autocast(stacked):
            return attention_stacked(stacked, pattern, heads=heads, qk_width=qk_width, backend=backend)
    _check_stacked(stacked, heads, qk_width)
    q, k, v = heads_of(stacked, heads, qk_width)
    if not wants_gradients(q, k, v):
        return attention(q, k, v, pattern, backend=backend)
    chosen = _chosen(q, k, v, pattern, None, backend, False)
    if chosen in BACKENDS and differentiable(chosen):
        return attention(q, k, v, pattern, backend=chosen)
    return stacked_attention(stacked, heads, qk_width, pattern, 1.0 / math.sqrt(q.shape[-1]), chosen)


def _check_stacked(stacked: torch.Tensor, heads: int, qk_width: int) -> None:
    if not isinstance(stacked, torch.Tensor):
        raise ArgumentError(f"stacked is {type(stacked).__name__}: it must be a tensor")
    widths = (qk_width, stacked.shape[-1] - 2 * qk_width) if stacked.dim() == 3 else ()
    if heads < 1 or not widths or min(widths) < 1 or any(width % heads for width in widths):
        raise ArgumentError(
            f"stacked {tuple(stacked.shape)} with heads={heads} and qk_width={qk_width}: it must be [batch, length, "
            "2 * qk_width + v_width], both widths multiples of heads"
        )


def _chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None,
    backend: str | None,
    return_lse: bool,
) -> str:
    """The backends of a call, as `both_halves` or, while it is compiled, `later` says them; all is checked."""
    check_types(q, k, v, pattern, scale)
    shapes, dtypes, devices = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    through_lse = wants_lse_gradient(return_lse, q, k, v)
    if torch.compiler.is_compiling():
        check_tensors(shapes, dtypes, devices)
        chosen = later(backend, through_lse)
    else:
        strides = (q.stride(), k.stride(), v.stride())
        fixed = torch.are_deterministic_algorithms_enabled()
        chosen = _settle(pattern, shapes, strides, dtypes, devices, backend, through_lse, fixed)
    if chosen != "reference":
        refuse_tangents(chosen if chosen in BACKENDS else "chosen", q, k, v)
    return chosen


@lru_cache(maxsize=1024)
def _settle(
    pattern: Pattern,
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    backend: str | None,
    through_lse: bool,
    deterministic: bool,
) -> str:
    """The backends, as `both_halves` says them: all is checked and chosen once for each kind of call."""
    check_tensors(shapes, dtypes, devices)
    (q, k, v), (q_stride, k_stride, v_stride) = shapes, strides
    strides = (q_stride, k_stride, v_stride)
    request = Request(pattern, q, k, v, dtypes[0], devices[0].type, strides, through_lse, deterministic=deterministic)
    return both_halves(request, backend)


def forget() -> None:
    """Choose anew at the next call, as after a change of `BACKENDS` or of what a backend refuses."""
    _settle.cache_clear()
