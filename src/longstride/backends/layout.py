"""How results lie in memory: heads and tokens in the order of what they were made of.

A projection writes [batch, length, heads * dim], and q, k and v are views of it. Results that lie so too are read by
the next projection, and gradients by the one before, as they are: no copy stands around the attention. Operators
promise their strides to the compiler, so every backend that runs in one keeps to this, and so do their fakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longstride.backends.request import QKV


def by_token(x: torch.Tensor) -> bool:
    """True where x [batch, heads, length, dim] has the heads of a token side by side, not the tokens of a head."""
    return x.shape[1] > 1 and x.shape[2] > 1 and x.stride(1) < x.stride(2)


def empty_as(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """A new dense tensor [batch, heads, length, dim] in the order of x; dim is x's unless given.

    >>> empty_as(torch.zeros(2, 100, 4, 16).transpose(1, 2), dim=8).stride()
    (3200, 8, 32, 1)
    """
    batch, heads, length, width = x.shape
    dim = width if dim is None else dim
    if by_token(x):
        return x.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, length, dim))


def heads_of(stacked: torch.Tensor, heads: int, qk_width: int) -> QKV:
    """q, k and v, which lie side by side in [batch, length, 2 * qk_width + v_width], as views by heads.

    >>> q, k, v = heads_of(torch.zeros(2, 100, 64 + 64 + 128), heads=4, qk_width=64)
    >>> q.shape, v.shape, v.stride()
    (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 100, 32]), (25600, 32, 256, 1))
    """
    batch, length, width = stacked.shape
    widths = (qk_width, qk_width, width - 2 * qk_width)
    q, k, v = (
        x.view(batch, length, heads, x.shape[-1] // heads).transpose(1, 2) for x in stacked.split(widths, dim=-1)
    )
    return q, k, v


def laid_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x, dense and in the order of `like`; a copy where it is not. The shapes may differ in dim."""
    if by_token(like):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def placed(grads: Sequence[torch.Tensor], likes: QKV, into: QKV | None) -> QKV:
    """Gradients in the dtypes of q, k and v: in the order of `likes`, or copied `into` other memory."""
    if into is not None:
        for place, grad in zip(into, grads, strict=True):
            if place is not grad:
                place.copy_(grad)
        return into
    grad_q, grad_k, grad_v = (laid_as(grad.to(x.dtype), x) for grad, x in zip(grads, likes, strict=True))
    return grad_q, grad_k, grad_v
