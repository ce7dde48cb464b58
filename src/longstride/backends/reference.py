"""The truth: dense attention by the definition, in plain differentiable PyTorch. It costs q_len x kv_len."""

from __future__ import annotations

import torch

from longstride.backends.documents import read_back
from longstride.backends.request import DTYPES, Request, accumulator
from longstride.patterns import Pattern

name = "reference"
differentiable = True
takes_lse_gradient = True


def refusals(request: Request) -> list[str]:
    if request.dtype not in DTYPES:
        return [f"dtype {request.dtype} is none of float16, bfloat16, float32, float64"]
    return []


def describe(request: Request) -> str:
    pairs = request.num_heads * request.q_len * request.kv_len
    return f"dense by the definition: {pairs:,} pairs scored and held in memory; for checking, not for speed"


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, differentiable by autograd; shapes as in `longstride.attention`."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    dtype = accumulator(q.dtype)
    keys, values = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v))
    allowed = _mask(pattern, q.shape[2], k.shape[2], heads).to(q.device)
    scores = (q.to(dtype) @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    some = allowed.any(-1).expand(scores.shape[:-1])
    # A row of nothing but -inf has no softmax, and its NaN gradient would spread: give it zeros, then cut it off.
    lse = scores.masked_fill(~some[..., None], 0.0).logsumexp(-1).masked_fill(~some, float("-inf"))
    weights = (scores - lse.masked_fill(~some, 0.0)[..., None]).exp()
    return (weights @ values).to(q.dtype), lse


def forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: Pattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each document on its own by `forward`; shapes as in `longstride.attention_varlen`."""
    lengths = read_back(cu_seqlens, q.shape[0], max_seqlen)
    results = [
        forward(*(x.transpose(0, 1)[None] for x in document), pattern, scale)
        for document in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        if len(document[0])
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in results]), torch.cat([lse[0].T for _, lse in results])


def _mask(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> torch.Tensor:
    """bool [heads or 1, q_len, kv_len]: one mask for all heads where they agree."""
    rules = pattern.split_heads(heads)
    same = len(set(rules)) == 1
    return torch.stack([rule.mask(q_len, kv_len) for rule in (rules[:1] if same else rules)])
