"""What a query may not see cannot change a bit of its output, whatever finite value it has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import assert_blind, make_inputs
from tests.strategies import ATOMS, lengths, patterns

import longstride as ls

MOST = torch.finfo(torch.float32).max
POISONS = [0.0, -7.5, 1e30, MOST, -MOST]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_an_atom_does_not_see_past_its_rule(pattern, backend):
    for poison in (1e30, MOST):
        for row in (0, 3, 17, 36):
            assert_blind(pattern, 37, 37, row, backend, poison)
            assert_blind(pattern, 37, 50, row, backend, poison, kv_heads=4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=80)
@given(pattern=patterns(), size=lengths(), row=st.integers(0, 47), poison=st.sampled_from(POISONS))
def test_no_expression_sees_past_its_rule(backend, pattern, size, row, poison):
    assert_blind(pattern, *size, row % size[0], backend, poison)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "pattern", [ls.Local(5), ls.Strided(5), ls.Fixed(8, 2), ls.LogSparse(), ls.Local(4) | ls.Strided(4), ls.bigbird(4)]
)
def test_no_dtype_sees_past_the_rule(pattern, dtype):
    for row in (0, 11, 40):
        assert_blind(pattern, 41, 41, row, "torch", torch.finfo(dtype).max, dtype)


@pytest.mark.parametrize(
    "pattern",
    [ls.Causal(), ls.Local(70), ls.Strided(16), ls.Fixed(32, 4), ls.Local(64) | ls.Strided(64), ls.bigbird(16)],
    ids=str,
)
def test_long_sequences_of_many_tiles_too(pattern):
    for row in (0, 100, 333, 599):
        assert_blind(pattern, 600, 600, row, "torch", MOST, heads=2, kv_heads=1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@settings(max_examples=40)
@given(pattern=patterns(), size=lengths(), row=st.integers(0, 47), poison=st.sampled_from([-7.5, 1e4, 1e30]))
def test_gradients_do_not_pass_the_rule_either(backend, pattern, size, row, poison):
    """The loss of one query: unseen keys and values get exactly nothing, and its own gradient is as it was."""
    row %= size[0]
    q, k, v = make_inputs(1, 4, 4, *size, dtype=torch.float32)
    seen = pattern.mask(*size, heads=4)[None, :, row, :, None]
    wanted = _gradients_of_row(q, k, v, pattern, row, backend)
    poisoned = [torch.where(seen, x.detach(), poison).requires_grad_() for x in (k, v)]
    got = _gradients_of_row(q, *poisoned, pattern, row, backend)
    assert torch.equal(got[0][:, :, row], wanted[0][:, :, row])
    for before, after in zip(wanted[1:], got[1:], strict=True):
        assert torch.equal(after, before)
        assert not after[~seen.expand_as(after)].any()


def _gradients_of_row(q, k, v, pattern, row, backend) -> tuple[torch.Tensor, ...]:
    out, lse = ls.attention(q, k, v, pattern, backend=backend, return_lse=True)
    loss = out[:, :, row].sin().sum() + lse[:, :, row].masked_fill(lse[:, :, row] == -torch.inf, 0.0).sum()
    return torch.autograd.grad(loss, (q, k, v))
