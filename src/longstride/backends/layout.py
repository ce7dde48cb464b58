"""How results lie in memory: heads and tokens in the order of what they were made of.

A projection writes [batch, length, heads * dim], and q, k and v are views of it. Results that lie so too are read by
the next projection, and gradients by the one before, as they are: no copy stands around the attention. Operators
promise their strides to the compiler, so every backend that runs in one keeps to this, and so do their fakes.
"""

from __future__ import annotations

import torch


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


def laid_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x, dense and in the order of `like`; a copy where it is not. The shapes may differ in dim."""
    if by_token(like):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()
