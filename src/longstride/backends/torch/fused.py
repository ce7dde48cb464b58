"""PyTorch's own fused attention kernels, called for their log-sum-exp, and a plain path that gives the same numbers.

The kernels that return the log-sum-exp are private operators of PyTorch. `kernel` names the one that serves a device
and dtype, after a look at whether this PyTorch has it under the signature that is used here; otherwise the plain path
computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.nn.functional import pad

from longstride.backends.request import accumulator
from longstride.backends.torch.tile_math import tile_backward, tile_forward

#: Scores that the plain path holds at once.
PLAIN_SCORES = 1 << 24

_OPERATORS = {
    "flash-cpu": ("_scaled_dot_product_flash_attention_for_cpu", 5, "attn_mask"),
    "flash-cuda": ("_scaled_dot_product_flash_attention", 6, "return_debug_mask"),
}


@lru_cache
def _has(name: str) -> bool:
    """True when this PyTorch has the operator and its backward, with the arguments used here."""
    operator, positional, argument = _OPERATORS[name]
    if not (hasattr(torch.ops.aten, operator) and hasattr(torch.ops.aten, operator + "_backward")):
        return False
    arguments = [a.name for a in getattr(torch.ops.aten, operator).default._schema.arguments]
    return len(arguments) >= positional and argument in arguments and "scale" in arguments


#: The most rows of a batch, or heads, of one launch on a CUDA device.
MOST_ROWS = 65535


def kernel(device_type: str, dtype: torch.dtype, head_dim: int, rows: int = 1) -> str:
    """``flash-cpu``, ``flash-cuda`` or ``plain``: what computes unmasked tiles here; rows: of the batch, or heads."""
    if device_type == "cpu" and _has("flash-cpu"):
        return "flash-cpu"
    half = dtype in (torch.float16, torch.bfloat16)
    if device_type == "cuda" and half and head_dim <= 256 and rows <= MOST_ROWS and _has("flash-cuda") and _ampere():
        return "flash-cuda"
    return "plain"


def _ampere() -> bool:
    """True on NVIDIA devices from compute capability 8.0 on, which the flash kernels need."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [batch, heads, rows, dim] views, all of one dim; out and its log-sum-exp [batch, heads, rows]."""
    chosen = kernel(q.device.type, q.dtype, q.shape[-1], max(q.shape[:2]))
    if scale <= 0:
        # The kernels scale a triangle's -inf too, which only a positive scale survives: scale q instead.
        q, scale = q * scale, 1.0
    if chosen == "flash-cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, causal, scale=scale)
    if chosen == "flash-cuda":
        q, k, v = (_to_eight(x) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out, lse[..., : q.shape[2]]
    return _plain_forward(q, k, v, scale, causal)


def fused_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    causal: bool,
    through_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `fused_forward`'s q, k, v given the merged out, log-sum-exp and ``delta``.

    The kernels compute delta = sum(out * grad_out) themselves, so where a gradient comes `through_lse` besides, and
    delta is less by it, the plain path takes over.
    """
    chosen = kernel(q.device.type, q.dtype, q.shape[-1], max(q.shape[:2]))
    dim = q.shape[-1]
    if chosen == "plain" or through_lse:
        return _plain_backward(grad_out, q, k, v, lse, delta, scale, causal)
    if scale <= 0:
        grad_q, grad_k, grad_v = fused_backward(
            grad_out, q * scale, k, v, out, lse, delta, scale=1.0, causal=causal, through_lse=False
        )
        return grad_q * scale, grad_k, grad_v
    if chosen == "flash-cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = flash(grad_out, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale)
    else:
        grad_out, q, k, v, out = (_to_eight(x) for x in (grad_out, q, k, v, out))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        none = torch.zeros(0, dtype=torch.uint64, device=q.device)
        rows, keys = q.shape[2], k.shape[2]
        grads = flash(
            grad_out, q, k, v, out, lse.contiguous(), None, None, rows, keys, 0.0, causal, seed, none, scale=scale
        )
    return tuple(grad[..., :dim] for grad in grads[:3])  # type: ignore[return-value]


def _to_eight(x: torch.Tensor) -> torch.Tensor:
    """The CUDA kernel wants the last dim to be a multiple of 8: pad with zeros, which change no score."""
    return pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _blocks(
    q: torch.Tensor, k: torch.Tensor, causal: bool
) -> Iterator[tuple[slice, slice, slice, torch.Tensor | None]]:
    """(tiles, rows, keys, allowed) runs of flat [tiles, rows, dim] tiles whose scores fit in `PLAIN_SCORES`.

    A tile that is too large goes by runs of rows, each against the keys up to its last row where `causal`, so that
    nothing of rows x keys is ever held.
    """
    length, most = q.shape[1], k.shape[1]
    rows = min(length, max(1, PLAIN_SCORES // most))
    tiles = max(1, PLAIN_SCORES // (rows * most))
    for low in range(0, length, rows):
        high = min(low + rows, length)
        keys = high if causal else most
        row, key = torch.arange(low, high, device=q.device), torch.arange(keys, device=q.device)
        allowed = row[:, None] >= key if causal else None
        for first in range(0, q.shape[0], tiles):
            yield slice(first, first + tiles), slice(low, high), slice(keys), allowed


def _plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, shape = accumulator(q.dtype), q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = q.new_empty(*q.shape[:2], v.shape[-1], dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=dtype)
    for tiles, rows, keys, allowed in _blocks(q, k, causal):
        block = (q[tiles, rows].to(dtype), k[tiles, keys].to(dtype), v[tiles, keys].to(dtype))
        out[tiles, rows], lse[tiles, rows] = tile_forward(*block, scale, allowed)
    return out.unflatten(0, shape), lse.unflatten(0, shape)


def _plain_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, shape = accumulator(q.dtype), q.shape[:2]
    q, k, v, grad_out, lse, delta = (x.flatten(0, 1) for x in (q, k, v, grad_out, lse, delta))
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for tiles, rows, keys, allowed in _blocks(q, k, causal):
        block = (q[tiles, rows].to(dtype), k[tiles, keys].to(dtype), v[tiles, keys].to(dtype))
        known = (x[tiles, rows].to(dtype) for x in (grad_out, lse, delta))
        of_q, of_k, of_v = tile_backward(*block, *known, scale, allowed)
        grad_q[tiles, rows] = of_q
        grad_k[tiles, keys] += of_k
        grad_v[tiles, keys] += of_v
    return grad_q.unflatten(0, shape), grad_k.unflatten(0, shape), grad_v.unflatten(0, shape)
