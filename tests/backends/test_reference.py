"""The truth itself: against loops over the definition, and against PyTorch's dense attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from tests.oracle import assert_same, attend, make_inputs, plain, results
from tests.strategies import ATOMS, lengths, patterns

import longstride as ls


@pytest.mark.parametrize("pattern", [*ATOMS, ls.per_head(ls.Local(3), ls.Summary(4, 1))], ids=str)
def test_every_output_is_its_definition(pattern):
    """A loop over queries, with the keys that the pattern allows one by one."""
    q, k, v = (x.detach() for x in make_inputs(2, 4, 2, 7, 19, 3, 5))
    out, lse = ls.attention(q, k, v, pattern, backend="reference", return_lse=True)
    mask = pattern.mask(7, 19, heads=4)
    for batch in range(2):
        for head in range(4):
            for row in range(7):
                keys = mask[head, row].nonzero().flatten().tolist()
                if not keys:
                    assert lse[batch, head, row] == -math.inf
                    assert not out[batch, head, row].any()
                    continue
                exponents = [
                    math.exp(float(q[batch, head, row] @ k[batch, head // 2, key]) / math.sqrt(3)) for key in keys
                ]
                total = sum(exponents)
                mean = sum(
                    weight / total * v[batch, head // 2, key] for weight, key in zip(exponents, keys, strict=True)
                )
                assert lse[batch, head, row].item() == pytest.approx(math.log(total), abs=1e-12)
                torch.testing.assert_close(out[batch, head, row], mean, rtol=0, atol=1e-12)


@settings(max_examples=60)
@given(patterns(), lengths())
def test_results_and_gradients_are_those_of_dense_attention(pattern, size):
    inputs = make_inputs(1, 4, 4, *size)
    mask = pattern.mask(*size, heads=4)
    # Rows without keys have no dense answer: leave them out of the comparison, and see that they are zero.
    some = mask.any(-1)
    out = ls.attention(*inputs, pattern, backend="reference")
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=mask | ~some[..., None])
    torch.testing.assert_close(out[:, some], dense[:, some], rtol=0, atol=1e-12)
    assert not out[:, ~some].any()
    weights = torch.randn_like(out) * some[None, :, :, None]
    got, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (out, dense))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [None, 0.0, 0.7, -0.7])
def test_the_scale_multiplies_scores(scale):
    inputs = make_inputs(2, 4, 2, 5, 9)
    mask = ls.Local(4).mask(5, 9)[None]
    assert_same(
        results(attend(ls.Local(4), "reference", scale), inputs),
        results(lambda q, k, v: plain(q, k, v, mask, scale), inputs),
        tolerance=1e-12,
    )


def test_a_scale_of_zero_averages_the_values():
    q, k, v = make_inputs(1, 2, 2, 9, 9)
    for backend in ("reference", "torch"):
        out, lse = ls.attention(q, k, v, ls.Causal(), scale=0.0, backend=backend, return_lse=True)
        torch.testing.assert_close(out[:, :, 5], v[:, :, :6].mean(2), rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[0, 0], torch.arange(1.0, 10.0, dtype=torch.float64).log(), rtol=0, atol=1e-12)
