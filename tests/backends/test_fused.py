"""PyTorch's fused operators and the plain path that stands in for them: the same numbers."""

import math

import pytest
import torch
from tests.oracle import EXACT, assert_same, attend, make_inputs, plain, results

import longstride as ls
from longstride.backends.torch import fused


@pytest.fixture
def without_fused_operators(monkeypatch):
    """As with a PyTorch that has other private operators."""
    monkeypatch.setattr(fused, "kernel", lambda *_: "plain")
    # The plain path must not call them after all.
    operators = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    calls = []
    monkeypatch.setattr(fused, "_has", lambda name: calls.append(name))
    yield operators
    assert calls == []


PATTERNS = [
    ls.Causal(),
    ls.Strided(5),
    ls.Strided(4, causal=False),
    ls.BlockLocal(6),
    ls.Fixed(8, 2),
    ls.Local(4) | ls.Strided(4),
    ls.per_head(ls.Full(), ls.Summary(8, 2)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("size", [(41, 41), (9, 40)])
def test_the_plain_path_is_exact_too(pattern, size, without_fused_operators):  # noqa: ARG001
    for scale in (None, 0.0, -0.4):
        for through_lse in (True, False):
            inputs = make_inputs(2, 2, 1, *size, 4, 6)
            got, wanted = (
                results(attend(pattern, backend, scale), inputs, through_lse=through_lse)
                for backend in ("torch", "reference")
            )
            assert_same(got, wanted)


def test_the_plain_path_works_in_slabs(without_fused_operators, monkeypatch):  # noqa: ARG001
    inputs = make_inputs(2, 3, 3, 40, 40)
    whole = results(attend(ls.Strided(5), "torch"), inputs)
    monkeypatch.setattr(fused, "PLAIN_SCORES", 100)
    assert_same(results(attend(ls.Strided(5), "torch"), inputs), whole, 1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.5, 0.0, -0.5])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("path", ["chosen", "plain"])
def test_one_fused_call_is_dense_attention(causal, scale, with_lse, path, monkeypatch):
    if path == "plain":
        monkeypatch.setattr(fused, "kernel", lambda *_: "plain")
    q, k, v = make_inputs(3, 2, 2, 7, 7, 5)
    mask = torch.ones(7, 7, dtype=torch.bool)
    wanted_out, wanted_lse = plain(q, k, v, mask.tril() if causal else mask, scale)
    out, lse = fused.fused_forward(q.detach(), k.detach(), v.detach(), scale, causal)
    torch.testing.assert_close(out, wanted_out, rtol=0, atol=EXACT)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=EXACT)
    into_out, into_lse = torch.randn_like(out), torch.randn_like(lse) * with_lse
    wanted = torch.autograd.grad((wanted_out, wanted_lse), (q, k, v), (into_out, into_lse))
    delta = (out * into_out).sum(-1) - into_lse
    got = fused.fused_backward(
        into_out,
        *(x.detach() for x in (q, k, v)),
        out,
        lse,
        delta,
        scale=scale,
        causal=causal,
        through_lse=with_lse,
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_the_backward_of_a_part_takes_the_merged_result():
    """Given the log-sum-exp and delta of a longer softmax, a tile's gradients are its share of the longer one's."""
    q, k, v = make_inputs(1, 1, 1, 6, 10)
    mask = torch.ones(6, 10, dtype=torch.bool)
    out, lse = plain(q, k, v, mask)
    into = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), into)
    total_q = 0
    for keys in (slice(0, 4), slice(4, 10)):
        grad_q, grad_k, grad_v = fused.fused_backward(
            into,
            q.detach(),
            k.detach()[:, :, keys],
            v.detach()[:, :, keys],
            out.detach(),
            lse.detach(),
            (out * into).sum(-1).detach(),
            scale=0.5,
            causal=False,
            through_lse=False,
        )
        total_q = total_q + grad_q
        torch.testing.assert_close(grad_k, wanted[1][:, :, keys], rtol=0, atol=EXACT)
        torch.testing.assert_close(grad_v, wanted[2][:, :, keys], rtol=0, atol=EXACT)
    torch.testing.assert_close(total_q, wanted[0], rtol=0, atol=EXACT)


def test_the_kernel_is_named_by_device_dtype_and_width():
    assert fused.kernel("cpu", torch.float32, 64) in ("flash-cpu", "plain")
    assert fused.kernel("cuda", torch.float32, 64) == "plain"
    assert fused.kernel("cuda", torch.float64, 64) == "plain"
    assert fused.kernel("cuda", torch.bfloat16, 512) == "plain"
    assert fused.kernel("meta", torch.float32, 64) == "plain"


def test_this_pytorch_has_the_fused_operator():
    """The pinned PyTorch does: losing it would cost speed in silence."""
    assert fused.kernel("cpu", torch.float32, 64) == "flash-cpu"
    assert math.isfinite(fused.fused_forward(*(torch.ones(1, 1, 3, 4),) * 3, 1.0, True)[1].sum())


@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_path_never_holds_a_whole_large_tile(monkeypatch, causal):
    """With room for few scores it goes by runs of rows, and the numbers are those of one piece."""
    torch.manual_seed(0)
    q, k, v, grad_out = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(4))
    delta = torch.randn(2, 3, 40, dtype=torch.float64)
    whole = fused._plain_forward(q, k, v, 0.3, causal)
    grads = fused._plain_backward(grad_out, q, k, v, whole[1], delta, 0.3, causal)
    monkeypatch.setattr(fused, "PLAIN_SCORES", 300)
    sizes = []
    forward = fused.tile_forward
    monkeypatch.setattr(
        fused,
        "tile_forward",
        lambda q, k, *rest: (sizes.append(q.shape[0] * q.shape[1] * k.shape[1]), forward(q, k, *rest))[1],
    )
    in_runs = fused._plain_forward(q, k, v, 0.3, causal)
    assert max(sizes) <= 300
    for found, expected in zip(
        (*in_runs, *fused._plain_backward(grad_out, q, k, v, whole[1], delta, 0.3, causal)),
        (*whole, *grads),
        strict=True,
    ):
        assert (found - expected).abs().max() < 1e-12
