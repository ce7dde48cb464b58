"""The public op on packed documents."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, overload

import torch

from longstride.backends.documents import read_back
from longstride.dispatch.checks import (
    PACKED,
    autocast,
    autocast_on,
    check_tensors,
    check_types,
    no_autocast,
    refuse_tangents,
    wants_lse_gradient,
)
from longstride.dispatch.choice import BACKENDS, choose, differentiable, later
from longstride.dispatch.custom_ops import packed, varlen_request
from longstride.errors import ArgumentError
from longstride.patterns import Pattern


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
    max_seqlen: int | None = ...,
) -> torch.Tensor: ...
@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
    max_seqlen: int | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    max_seqlen: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` on each of several documents that lie one after another, without padding.

    Positions start at 0 in every document, and no document sees another: document n, the tokens cu_seqlens[n] ..
    cu_seqlens[n + 1] - 1, gets what `attention` gives for it alone.

    >>> import torch, longstride as ls
    >>> q, k, v = (torch.randn(150, 2, 16) for _ in range(3))
    >>> documents = torch.tensor([0, 100, 101, 150])  # of 100, 1 and 49 tokens
    >>> out = ls.attention_varlen(q, k, v, documents, ls.Local(8) | ls.Strided(8))
    >>> alone = ls.attention(*(x[:100].transpose(0, 1)[None] for x in (q, k, v)), ls.Local(8) | ls.Strided(8))
    >>> torch.allclose(out[:100], alone[0].transpose(0, 1), atol=1e-5)
    True

    Args:
        q: [total, heads, head_dim], float16, bfloat16, float32 or float64, any strides.
        k: [total, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: [total, kv_heads, v_head_dim].
        cu_seqlens: int32 or int64 [documents + 1], on q's device: starts at 0, never decreases, ends at total. A
            document may be empty.
        pattern: which pairs may attend in each document.
        scale, backend, return_lse: as in `attention`.
        max_seqlen: the tokens of the longest document, or more. Without it cu_seqlens is read back from the device
            and checked. With it this call reads nothing back, as CUDA graphs and torch.compile want it, and a wrong
            cu_seqlens is the caller's mistake; backends on the CPU, and `torch`, look at cu_seqlens all the same.

    Returns:
        out [total, heads, v_head_dim] in q's dtype; with `return_lse` also lse [total, heads] in float32 (float64 for
        float64).

    Raises:
        ArgumentError: shapes, dtypes, devices or offsets that do not fit together.
        UnsupportedError: no backend, or not the named one, takes the request.
    """
    if autocast_on(q):
        q, k, v = autocast(q, k, v)
        options: Any = {"scale": scale, "backend": backend, "return_lse": return_lse, "max_seqlen": max_seqlen}
        with no_autocast(q):
            return attention_varlen(q, k, v, cu_seqlens, pattern, **options)
    check_types(q, k, v, pattern, scale, PACKED)
    shapes, dtypes, devices = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    if torch.compiler.is_compiling():
        check_tensors(shapes, dtypes, devices, PACKED)
    else:
        _check_tensors_once(shapes, dtypes, devices)
    _check_documents(cu_seqlens, q, max_seqlen)
    if max_seqlen is None:
        max_seqlen = max(read_back(cu_seqlens, q.shape[0]))
    through_lse = wants_lse_gradient(return_lse, q, k, v)
    if torch.compiler.is_compiling():
        chosen = later(backend, through_lse)
    else:
        sizes = (q.shape[1:], k.shape[1:], v.shape[1:])
        chosen = _settle(pattern, sizes, max_seqlen, q.dtype, q.device.type, backend, through_lse)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if chosen != "reference":
        refuse_tangents(chosen if chosen in BACKENDS else "chosen", q, k, v)
    if chosen in BACKENDS and differentiable(chosen):
        out, lse = BACKENDS[chosen].forward_varlen(q, k, v, cu_seqlens, max_seqlen, pattern, scale)
    else:
        out, lse = packed(q, k, v, cu_seqlens, max_seqlen, pattern, scale, chosen)
    return (out, lse) if return_lse else out


@lru_cache(maxsize=1024)
def _settle(
    pattern: Pattern,
    sizes: tuple[tuple[int, ...], ...],
    max_seqlen: int,
    dtype: torch.dtype,
    device_type: str,
    backend: str | None,
    through_lse: bool,
) -> str:
    """The backend, chosen once for each kind of call."""
    request = varlen_request(pattern, sizes, max_seqlen, dtype, device_type, through_lse)
    return choose(request, backend)[0]


@lru_cache(maxsize=1024)
def _check_tensors_once(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], devices: tuple[torch.device, ...]
) -> None:
    """What `check_tensors` found nothing wrong with is not looked at again. Tokens vary more than choices do."""
    check_tensors(shapes, dtypes, devices, PACKED)


def _check_documents(cu_seqlens: Any, q: torch.Tensor, max_seqlen: Any) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ArgumentError(f"cu_seqlens is {type(cu_seqlens).__name__}: it must be a tensor [documents + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"cu_seqlens is {cu_seqlens.dtype}: it must be int32 or int64; convert it")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ArgumentError(f"cu_seqlens has shape {list(cu_seqlens.shape)}: it must be [documents + 1], at least [2]")
    if cu_seqlens.device != q.device:
        raise ArgumentError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: they must be on one device")
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
        raise ArgumentError(f"max_seqlen={max_seqlen!r}: it must be a whole number, or None to read it back")
    if max_seqlen < 1:
        raise ArgumentError(f"max_seqlen={max_seqlen}: it must be at least 1")
