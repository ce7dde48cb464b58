"""The `torch` backend: really sparse, on any device, out of PyTorch's own kernels.

Work and memory grow with the pairs that a plan's tiles score, never with q_len x kv_len.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from longstride.backends.layout import empty_as, laid_as, placed
from longstride.backends.request import DTYPES, QKV, Request, accumulator
from longstride.backends.torch.engine import run_backward, run_forward
from longstride.backends.torch.fused import kernel
from longstride.backends.torch.state import Gradients, Inputs
from longstride.backends.torch.varlen import each_length
from longstride.patterns import Pattern
from longstride.plan import Plan, plan

name = "torch"
differentiable = False
takes_lse_gradient = True


def refusals(request: Request) -> list[str]:
    if request.dtype not in DTYPES:
        return [f"dtype {request.dtype} is none of float16, bfloat16, float32, float64"]
    return []


def describe(request: Request) -> str:
    width = max(request.head_dim, request.v_head_dim)
    chosen = kernel(request.device_type, request.dtype, width)
    made = plan(request.pattern, request.q_len, request.kv_len, request.num_heads)
    ratio = made.scored_pairs / max(1, made.pairs)
    text = f"{made.scored_pairs:,} pairs scored, {ratio:.2f} for one allowed; unmasked tiles by {chosen}"
    rules = sorted(
        {str(region.pattern) for part in made.parts for region in part.term.regions if hasattr(region, "pattern")}
    )
    if rules:
        cost = request.q_len * request.kv_len
        text += (
            f"; the rule of {', '.join(rules)} is the user's own: it is evaluated on all {cost:,} pairs once a length "
            f"(the blocks found are cached), then looked up inside every block that has a pair"
        )
    return text


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, heads, q_len, v_head_dim] in q's dtype, lse [batch, heads, q_len]; not differentiable by itself."""
    batch, heads, q_len, _ = q.shape
    made = plan(pattern, q_len, k.shape[2], heads)
    dtype = accumulator(q.dtype)
    out = empty_as(q, v.shape[3])
    lse = torch.empty(batch, heads, q_len, dtype=dtype, device=q.device)
    for members, parts in made.groups:
        inputs = _inputs(q, k, v, members, scale)
        result = run_forward(inputs, parts)
        shape = (batch, len(members))
        group_out = result.out[..., : v.shape[3]].unflatten(0, shape)
        group_lse = result.lse.unflatten(0, shape)
        if len(made.groups) == 1:
            return laid_as(group_out.to(q.dtype), q), group_lse
        out[:, _heads(members)] = group_out.to(q.dtype)
        lse[:, _heads(members)] = group_lse
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern,
    scale: float,
    into: QKV | None = None,
) -> QKV:
    """Gradients of q, k and v in their shapes and dtypes."""
    batch, heads, q_len, dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[3]
    made: Plan = plan(pattern, q_len, k.shape[2], heads)
    dtype = accumulator(q.dtype)
    delta = torch.linalg.vecdot(out.to(dtype), grad_out.to(dtype))
    delta = delta if grad_lse is None else delta - grad_lse
    counted = lse.masked_fill(lse == float("-inf"), float("inf"))
    grad_q = empty_as(q) if into is None else into[0]
    grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (k, v))
    for members, parts in made.groups:
        inputs = _inputs(q, k, v, members, scale)
        picked = _heads(members)
        width = inputs.v.shape[2]
        known = [x[:, picked].flatten(0, 1) for x in (grad_out, out, counted, delta)]
        known[:2] = [pad(x, (0, width - v_dim)) if width > v_dim else x for x in known[:2]]
        grads = Gradients.empty(inputs, *known, through_lse=grad_lse is not None)
        run_backward(inputs, parts, grads)
        shape = (batch, len(members))
        if len(made.groups) == 1 and heads == kv_heads:
            whole = (grads.q[..., :dim], grads.k[..., :dim], grads.v[..., :v_dim])
            return placed([x.unflatten(0, shape) for x in whole], (q, k, v), into)
        grad_q[:, picked] = grads.q[..., :dim].unflatten(0, shape).to(q.dtype)
        readers = torch.tensor([head * kv_heads // heads for head in members], device=q.device)
        if heads == kv_heads:
            grad_k[:, picked] = grads.k[..., :dim].unflatten(0, shape)
            grad_v[:, picked] = grads.v[..., :v_dim].unflatten(0, shape)
        else:
            grad_k.index_add_(1, readers, grads.k[..., :dim].unflatten(0, shape))
            grad_v.index_add_(1, readers, grads.v[..., :v_dim].unflatten(0, shape))
    return placed((grad_q, grad_k, grad_v), (q, k, v), into)


def forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: Pattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [total, heads, v_head_dim] in q's dtype, lse [total, heads]; documents of one length run as one batch."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype), device=q.device)
    for documents in each_length(cu_seqlens, q.shape[0], max_seqlen):
        results = forward(*(documents.take(x) for x in (q, k, v)), pattern, scale)
        for whole, result in zip((out, lse), results, strict=True):
            documents.put(whole, result)
    return out, lse


def backward_varlen(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: Pattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their shapes and dtypes."""
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for documents in each_length(cu_seqlens, q.shape[0], max_seqlen):
        into_lse = None if grad_lse is None else documents.take(grad_lse)
        known = (documents.take(x) for x in (q, k, v, out, lse))
        found = backward(documents.take(grad_out), into_lse, *known, pattern=pattern, scale=scale)
        for whole, grad in zip(grads, found, strict=True):
            documents.put(whole, grad)
    return grads


def _heads(members: tuple[int, ...]) -> slice | list[int]:
    """A slice where the heads are neighbours, so that taking them is a view."""
    neighbours = members == tuple(range(members[0], members[0] + len(members)))
    return slice(members[0], members[0] + len(members)) if neighbours else list(members)


def _inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, members: tuple[int, ...], scale: float) -> Inputs:
    """The heads of one group as sequences, keys repeated to match (GQA), q, k and v of one width."""
    heads, kv_heads = q.shape[1], k.shape[1]
    picked = _heads(members)
    readers = picked if heads == kv_heads else [head * kv_heads // heads for head in members]
    width = max(q.shape[3], v.shape[3])
    taken = (q[:, picked], k[:, readers], v[:, readers])
    # Zeros beyond the narrower width change no score and no output that is kept.
    flat = [pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in taken]
    flat = [x if x.stride(-1) == 1 else x.contiguous() for x in flat]
    return Inputs(*(x.flatten(0, 1) for x in flat), scale)
