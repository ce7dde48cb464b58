"""Lower precisions: no worse than the same computation done plainly in that dtype, by the table in `oracle`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import FLOOR, assert_as_precise_as_plain, make_inputs
from tests.strategies import joined

import longstride as ls

DTYPES = list(FLOOR)

PATTERNS = [
    ls.Causal(),
    ls.Local(16),
    ls.Strided(8),
    ls.Fixed(16, 4),
    ls.Local(8) | ls.Strided(8),
    ls.Dilated(8, 3, lookahead=2),
    ls.LogSparse(),
    ls.longformer(12, 3),
    ls.bigbird(8),
    ls.per_head(ls.Local(16), ls.Strided(8)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_errors_stay_near_those_of_the_plain_computation(pattern, backend, dtype):
    assert_as_precise_as_plain(pattern, 90, 90, dtype, backend)
    assert_as_precise_as_plain(pattern, 33, 90, dtype, backend, kv_heads=1)


@settings(max_examples=40)
@given(joined(), st.sampled_from(DTYPES))
def test_any_expression_is_as_precise(pattern, dtype):
    # A few keys for every query: none has an empty row, and a softmax over one key alone rounds nothing when plain.
    assert_as_precise_as_plain(pattern | ls.Local(4), 48, 48, dtype, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dtypes_of_results(dtype, backend):
    q, k, v = make_inputs(1, 2, 2, 9, 9, dtype=dtype)
    out, lse = ls.attention(q, k, v, ls.Fixed(4, 1), backend=backend, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))
    assert {grad.dtype for grad in grads} == {dtype}


def test_float64_keeps_a_float64_log_sum_exp():
    for backend in ("torch", "reference"):
        out, lse = ls.attention(*make_inputs(1, 2, 2, 9, 9), ls.Fixed(4, 1), backend=backend, return_lse=True)
        assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_large_scores_do_not_overflow(pattern, dtype):
    """Scores of several hundred: exp of them is infinite, the softmax is not."""
    q, k, v = make_inputs(1, 2, 2, 40, 40, 16, dtype=dtype)
    out, lse = ls.attention(q * 20, k * 20, v, pattern, backend="torch", return_lse=True)
    assert lse.max() > 100
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.01
    for grad in torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v)):
        assert grad.isfinite().all()
