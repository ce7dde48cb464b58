"""The `triton` backend: kernels at the memory floor, for CUDA devices (and, to be checked, Triton's interpreter).

A pattern's plan is lowered to a few launches (`lowering`), whose kernels (`forward_kernel`, `backward_kernels`,
`cell_kernel`) take every pattern as numbers; nothing of size q_len x kv_len is ever there.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from longstride.backends.layout import empty_as
from longstride.backends.recorded import kept
from longstride.backends.request import QKV, Request
from longstride.backends.triton.lowering import obstacles
from longstride.patterns import Pattern
from longstride.plan import Plan, plan

name = "triton"
differentiable = False
takes_lse_gradient = True

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEAD_DIM = 256


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=256)
def _obstacles(made: Plan) -> tuple[str, ...]:
    return tuple(obstacles(made))


def refusals(request: Request) -> list[str]:
    found = []
    if not _installed():
        return ["triton is not installed: pip install longstride[triton]"]
    if request.device_type != "cuda" and not interpreted():
        return [f"device {request.device_type} is not cuda"]
    if request.dtype not in DTYPES:
        found.append(f"dtype {request.dtype} is none of float16, bfloat16, float32")
    widest = max(request.head_dim, request.v_head_dim)
    if widest > MOST_HEAD_DIM:
        found.append(f"head_dim {request.head_dim} or v_head_dim {request.v_head_dim} exceeds {MOST_HEAD_DIM}")
    found += _obstacles(plan(request.pattern, request.q_len, request.kv_len, request.num_heads))
    if request.varlen and _by_length(request.pattern, request.num_heads, request.kv_len):
        found.append(f"{request.pattern} depends on the length, which differs from document to document")
    return found


@lru_cache(maxsize=256)
def _by_length(pattern: Pattern, heads: int, length: int) -> bool:
    """True when a shorter sequence has other pairs than the start of a longer one."""
    return any(rule.bind(length) != rule.bind(1) for rule in pattern.split_heads(heads))


def describe(request: Request) -> str:
    made = plan(request.pattern, request.q_len, request.kv_len, request.num_heads)
    kinds = sorted({part.kind for part in made.parts})
    return f"Triton kernels, forward and backward, for {', '.join(kinds) or 'no part'}"


def _tf32(dtype: torch.dtype) -> bool:
    """float32 products may round to tf32 where PyTorch's own may."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def _prepared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Any:
    from longstride.backends.triton.prepare import prepare_batched

    made = prepare_batched(pattern, q.shape, k.shape, v.shape[3], q.dtype, q.device, _tf32(q.dtype))
    return kept(made, q.device)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, heads, q_len, v_head_dim] in q's dtype, lse [batch, heads, q_len]; not differentiable by itself."""
    from longstride.backends.triton.launch import run_forward

    made = _prepared(q, k, v, pattern)
    out = empty_as(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with _on(q):
        run_forward(q, k, v, made, scale, out, lse, k.shape[2] - q.shape[2], k.shape[2])
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
    from longstride.backends.triton.launch import run_backward

    made = _prepared(q, k, v, pattern)
    grads = (empty_as(q), empty_as(k), empty_as(v)) if into is None else into
    with _on(q):
        run_backward(grad_out, grad_lse, q, k, v, out, lse, made, scale, grads, k.shape[2] - q.shape[2], k.shape[2])
    return grads


def forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    pattern: Pattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [total, heads, v_head_dim] and lse [total, heads] of packed documents; nothing is read back."""
    from longstride.backends.triton.launch import run_forward

    made = _prepared_varlen(q, k, v, max_seqlen, pattern)
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    with _on(q):
        inputs, outputs = _batched(q, k, v), _batched(out, lse)
        run_forward(inputs[0], inputs[1], inputs[2], made, scale, outputs[0], outputs[1], 0, max_seqlen, cu_seqlens)
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
    from longstride.backends.triton.launch import run_backward

    made = _prepared_varlen(q, k, v, max_seqlen, pattern)
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    written = (grads[0].transpose(0, 1)[None], grads[1].transpose(0, 1)[None], grads[2].transpose(0, 1)[None])
    with _on(q):
        known = _batched(grad_out, grad_lse, q, k, v, out, lse)
        run_backward(*known, made, scale, written, 0, max_seqlen, cu_seqlens)
    return grads


def _prepared_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, longest: int, pattern: Pattern) -> Any:
    from longstride.backends.triton.prepare import Shapes, prepare

    shapes = Shapes(
        longest, longest, q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype, q.device, _tf32(q.dtype), True
    )
    return kept(prepare(pattern, shapes), q.device)


def _batched(*packed: torch.Tensor | None) -> list[Any]:
    """[total, heads, ...] as [1, heads, total, ...], a view."""
    return [None if x is None else x.transpose(0, 1)[None] for x in packed]


def _on(q: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    if q.device.type != "cuda" or _devices() == 1 or q.device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(q.device)


_AS_IT_IS = nullcontext()


@cache
def _devices() -> int:
    return torch.cuda.device_count()
