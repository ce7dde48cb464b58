"""The torch backend on a CUDA device against the float64 reference: outputs, log-sum-exp and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

import longstride as ls
from longstride.attention import attention_stacked
from longstride.backends.layout import heads_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PATTERNS = [
    ls.Causal(),
    ls.Full(),
    ls.Local(17),
    ls.Local(33, lookahead=32),
    ls.Dilated(9, 4),
    ls.Strided(16),
    ls.Strided(16, causal=False),
    ls.BlockLocal(32),
    ls.Summary(32, 4),
    ls.Fixed(32, 8),
    ls.LogSparse(),
    ls.Global(5),
    ls.longformer(32, 4),
    ls.bigbird(16),
    ls.RandomBlocks(16, 2),
    ls.Local(24) | ls.Strided(24),
    ls.Strided(16) | ls.Fixed(32, 4) | ls.Global(3),
    ls.per_head(ls.Local(24), ls.Strided(24)),
]
LENGTHS = [(256, 256), (203, 203), (1, 150), (77, 200)]

#: (forward, backward): the largest relative error ||a - b|| / ||b|| against float64 on the same rounded inputs.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (1e-2, 3e-2),
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_torch_backend_on_cuda(pattern: ls.Pattern, dtype: torch.dtype) -> None:
    dims = [(32, 32, 4), (20, 36, 2)]
    # Gradients through the output alone and through the log-sum-exp too take different kernels.
    for (q_len, kv_len), (head_dim, v_dim, kv_heads), through_lse in itertools.product(LENGTHS, dims, (False, True)):
        torch.manual_seed(q_len + kv_len + head_dim)
        shapes = ((4, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, v_dim))
        inputs = [torch.randn(2, *shape, device="cuda", dtype=dtype) for shape in shapes]
        weight = torch.randn(2, 4, q_len, v_dim, device="cuda", dtype=dtype)
        lse_weight = torch.randn(2, 4, q_len, device="cuda")
        results = []
        for as_dtype, backend in ((dtype, "torch"), (torch.float64, "reference")):
            leaves = [x.to(as_dtype).requires_grad_() for x in inputs]
            out, lse = ls.attention(*leaves, pattern, backend=backend, return_lse=True)
            finite = lse.masked_fill(lse == float("-inf"), 0.0)
            loss = (out * weight.to(as_dtype)).sum()
            loss = loss + (finite * lse_weight).sum() if through_lse else loss
            results.append([out, finite, *torch.autograd.grad(loss, leaves)])
        forward, backward = TOLERANCE[dtype]
        for index, (found, expected) in enumerate(zip(*results, strict=True)):
            bound = forward if index < 2 else backward
            error = relative_error(found, expected)
            assert error <= bound, (("out", "lse", "dq", "dk", "dv")[index], error, q_len, kv_len, head_dim)


@pytest.mark.parametrize("backend", [None, "triton", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_q_k_and_v_side_by_side(pattern: ls.Pattern, backend: str | None) -> None:
    """One gradient of all three, written in place over numbers that would be noticed."""
    for batch, length, qk_width, width in ((2, 203, 128, 256), (1, 256, 256, 256), (1, 130, 36, 40)):
        torch.manual_seed(length)
        rows = torch.randn(batch, length, 2 * qk_width + width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(batch, 4, length, width // 4, device="cuda", dtype=torch.bfloat16)
        poison = torch.full_like(rows, float("nan"))
        del poison  # the next tensor of that size is likely to get its memory
        out = attention_stacked(rows, pattern, heads=4, qk_width=qk_width, backend=backend)
        (found,) = torch.autograd.grad((out * weight).sum(), rows)
        exact = rows.detach().double().requires_grad_()
        truth = ls.attention(*heads_of(exact, 4, qk_width), pattern, backend="reference")
        (expected,) = torch.autograd.grad((truth * weight).sum(), exact)
        assert found.is_contiguous()
        assert relative_error(out, truth) < 1e-2
        for ours, theirs in zip(heads_of(found, 4, qk_width), heads_of(expected, 4, qk_width), strict=True):
            assert relative_error(ours, theirs) < 3e-2


def test_nothing_of_size_t_squared() -> None:
    q, k, v = (torch.randn(1, 2, 65536, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    ls.attention(q, k, v, ls.Local(256) | ls.Strided(256)).sum().backward()
    assert torch.cuda.max_memory_allocated() < 65536 * 65536 / 4  # a quarter of one byte a pair of one head
