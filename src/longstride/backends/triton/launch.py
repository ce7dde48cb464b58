"""Running the kernels: what a call does with what was prepared."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from longstride.backends.triton.backward_kernels import make_delta
from longstride.backends.triton.prepare import MOST_IN_GRID, Job, Prepared, padded

LOG2_E = 1.0 / math.log(2.0)


def _scales(scale: float) -> tuple[float, float, int]:
    """|scale| in base 2, |scale|, and its sign; a scale of 0 is taken as q = 0 at scale 1."""
    if scale == 0.0:
        return LOG2_E, 1.0, 0
    return abs(scale) * LOG2_E, abs(scale), 1 if scale > 0 else -1


def _wide(length: int, *tensors: torch.Tensor) -> bool:
    """True when offsets within a head, of up to `length` rows, need 64 bits."""
    return any(x.stride(2) * length + x.stride(3) * x.shape[3] >= 2**31 for x in tensors)


def _aligned(*tensors: torch.Tensor) -> int:
    """Which tensors start at a multiple of 16 bytes, as bits: the compiler uses wide loads for those.

    Only what callers give is asked; what is allocated here always does.
    """
    bits = 0
    for x in tensors:
        bits = 2 * bits + (x.data_ptr() % 16 == 0)
    return bits


def _run_all(batch: int, calls: list[tuple[Job, tuple, tuple]], flags: Callable[[], dict[str, Any]]) -> None:
    """Launch one after another; kernels that are still to be compiled are compiled side by side, in threads, before."""
    if len(calls) > 1:
        missing = [(job, arguments) for job, key, arguments in calls if key not in job.compiled]
        if len(missing) > 1 and calls[0][2][0].device.type == "cuda":
            with ThreadPoolExecutor(len(missing)) as threads, triton.AsyncCompileMode(threads):
                for job, arguments in missing:
                    job.compile(batch, arguments, flags)
    for job, key, arguments in calls:
        job.run(batch, key, arguments, flags)


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    made: Prepared,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    low: int,
    kv_len: int,
    starts: torch.Tensor | None = None,
) -> None:
    """Write out [batch, heads, q_len, v_dim] and lse [batch, heads, q_len]; starts: of packed documents (batch 1)."""
    batch = q.shape[0] if starts is None else starts.shape[0] - 1
    if batch > MOST_IN_GRID:
        for first in range(0, batch, MOST_IN_GRID):
            rows = slice(first, min(first + MOST_IN_GRID, batch))
            if starts is None:
                run_forward(q[rows], k[rows], v[rows], made, scale, out[rows], lse[rows], low, kv_len)
            else:
                run_forward(q, k, v, made, scale, out, lse, low, kv_len, starts[first : rows.stop + 1])
        return
    base2, _, sign = _scales(scale)
    share = q.shape[1] // k.shape[1]
    strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride(), *lse.stride())
    starts = made.lists if starts is None else starts
    key = (strides, _aligned(q, k, v, starts), starts.dtype, sign)

    def flags() -> dict[str, Any]:
        return {"SIGN": sign, "WIDE": _wide(kv_len, q, k, v, out)}

    if made.filled:
        out.zero_()
        lse.fill_(float("-inf"))
    calls = []
    for job in made.forward:
        if job.tiles:
            arguments = (
                q, k, v, out, lse, made.lists, starts, job.spots, *strides, low, kv_len, base2, job.head, share,
            )  # fmt: skip
            calls.append((job, key, arguments))
    _run_all(batch, calls, flags)


def run_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    made: Prepared,
    scale: float,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    low: int,
    kv_len: int,
    starts: torch.Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v; arguments as in `run_forward`."""
    batch = q.shape[0] if starts is None else starts.shape[0] - 1
    if batch > MOST_IN_GRID:
        for first in range(0, batch, MOST_IN_GRID):
            rows = slice(first, min(first + MOST_IN_GRID, batch))
            if starts is None:
                run_backward(
                    grad_out[rows], None if grad_lse is None else grad_lse[rows], q[rows], k[rows], v[rows], out[rows],
                    lse[rows], made, scale, (grads[0][rows], grads[1][rows], grads[2][rows]), low, kv_len,
                )  # fmt: skip
            else:
                piece = starts[first : rows.stop + 1]
                run_backward(grad_out, grad_lse, q, k, v, out, lse, made, scale, grads, low, kv_len, piece)
        return
    base2, absolute, sign = _scales(scale)
    share = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = grads
    starts = made.lists if starts is None else starts
    delta = lse  # stands in for it, unread, where the only launch makes delta for itself
    if not made.alone:
        delta = torch.empty_strided(lse.shape, lse.stride(), dtype=torch.float32, device=lse.device)
    has_grad_lse = grad_lse is not None
    grad_lse = lse if grad_lse is None else grad_lse
    if not made.delta:
        v_dim = v.shape[3]
        kernel: Any = make_delta
        kernel[(-(-lse.shape[2] // 64), lse.shape[1], lse.shape[0])](
            out, grad_out, grad_lse, delta, *out.stride(), *grad_out.stride(), *grad_lse.stride(), *lse.stride(),
            lse.shape[2], HAS_GRAD_LSE=has_grad_lse, WIDE=_wide(lse.shape[2], out, grad_out), BLOCK=64, V_DIM=v_dim,
            V_DIM_PAD=padded(v_dim),
        )  # fmt: skip
    if made.grads_filled[0]:
        grad_q.zero_()
    if made.grads_filled[1]:
        grad_k.zero_()
        grad_v.zero_()
    known = (
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *lse.stride(),
        *grad_out.stride(),
        *grad_lse.stride(),
    )
    bits = _aligned(q, k, v, out, lse, grad_out, grad_lse, starts)

    def flags() -> dict[str, Any]:
        return {"HAS_GRAD_LSE": has_grad_lse, "SIGN": sign, "WIDE": _wide(kv_len, q, k, v, out, grad_out, *grads)}

    into = {"q": ((grad_q,), grad_q.stride()), "kv": ((grad_k, grad_v), (*grad_k.stride(), *grad_v.stride()))}
    into["cell"] = (grads, (*grad_q.stride(), *into["kv"][1]))
    calls = []
    for kind, job in made.backward:
        if job.tiles:
            written, their_strides = into[kind]
            strides = (*known, *their_strides)
            readers = () if kind == "q" else (job.readers,)
            arguments = (
                q, k, v, out, lse, grad_out, grad_lse, delta, *written, made.lists, starts, job.spots, *strides,
                low, kv_len, base2, absolute, job.head, share, *readers,
            )  # fmt: skip
            calls.append((job, (strides, bits, starts.dtype, has_grad_lse, sign), arguments))
    _run_all(batch, calls, flags)
