"""Which requests the vendors' dense kernels take, and the views they are given; they run in tests/gpu."""

from dataclasses import replace

import pytest
import torch
from tests.oracle import make_inputs, plain
from tests.strategies import Thirds

import longstride as ls
from longstride.attention import describe
from longstride.backends import torch as torch_backend
from longstride.backends import triton, vendor
from longstride.backends.layout import heads_of
from longstride.backends.request import Request
from longstride.dispatch import custom_ops
from longstride.dispatch.choice import both_halves, choose


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(vendor, "kernel", lambda: "cudnn")


STRIDED = ls.Strided(64)


def request(pattern=STRIDED, length=4096, kv_len=None, dim=64, v_dim=None, kv_heads=4, **others):
    kv_len, v_dim = length if kv_len is None else kv_len, dim if v_dim is None else v_dim
    settings = {"dtype": torch.bfloat16, "device_type": "cuda"} | others
    shapes = (2, 4, length, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, v_dim)
    return Request(pattern, *shapes, **settings)


TAKEN = [
    (ls.Causal(), (1, True)),
    (ls.Full(), (1, False)),
    (ls.Strided(64), (64, True)),
    (ls.Strided(64, causal=False), (64, False)),
    (ls.Local(4096), (1, True)),
    (ls.Local(4096, lookahead=4095), (1, False)),
    (ls.Dilated(64, 64), (64, True)),
    (ls.Causal() | ls.Local(5), (1, True)),
    (ls.Strided(64) | ls.Strided(128), (64, True)),
    (ls.per_head(ls.Causal(), ls.Causal()), (1, True)),
]


@pytest.mark.parametrize(("pattern", "classes"), TAKEN, ids=str)
def test_patterns_that_are_dense_in_classes(pattern, classes):
    assert vendor.refusals(request(pattern)) == []
    assert vendor.classes_of(pattern, 4096, 4) == (*classes, None)


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in TAKEN], ids=str)
def test_the_classes_are_the_pattern(pattern):
    for length in (64, 128, 256):
        dilation, causal, _ = vendor.classes_of(pattern, length, 4) or (None, None, None)
        if dilation is not None:
            i, j = torch.arange(length)[:, None], torch.arange(length)
            inside = ((i - j) % dilation == 0) & ((j <= i) if causal else torch.ones_like(i, dtype=torch.bool))
            assert torch.equal(inside.expand(4, -1, -1), pattern.mask(length, heads=4))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(device_type="cpu"), "the tensors are on cpu"),
        (request(dtype=torch.float32), "neither float16 nor bfloat16"),
        (request(kv_heads=2), "4 heads share 2 kv_heads"),
        (request(ls.Causal(), kv_heads=2), "4 heads that share 2 kv_heads are for flash-attn-4"),
        (replace(request(), q_shape=(20000, 4, 4096, 64)), "take 65,535 rows of a batch"),
        (request(v_dim=32), "v_head_dim 32 is not head_dim 64"),
        (request(dim=60), "head_dim 60 is not a multiple of 8"),
        (request(dim=256), "head_dim 256"),
        (request(length=64, kv_len=128), "64 queries for 128 keys"),
        (request(ls.Local(64)), "windows are for flash-attn-4"),
        (request(ls.Local(64, lookahead=3)), "Local(64, lookahead=3) is not dense"),
        (request(ls.Local(64) | ls.Strided(64)), "is not dense"),
        (request(ls.per_head(ls.Causal(), ls.Strided(64))), "is not dense"),
        (request(ls.BlockLocal(64)), "is not dense"),
        (request(ls.Causal() & Thirds()), "is not dense"),
        (request(ls.Dilated(8, 64)), "windows are for flash-attn-4"),
        (request(length=4000), "the stride 64 does not divide the length 4000"),
        (request(length=64), "a single position"),
    ],
)
def test_other_requests_are_refused(asked, words):
    assert any(words in reason for reason in vendor.refusals(asked)), vendor.refusals(asked)


def test_without_kernels_it_refuses(monkeypatch):
    monkeypatch.setattr(vendor, "kernel", lambda: None)
    assert vendor.refusals(request()) == ["PyTorch has neither cuDNN nor FlashAttention kernels for this device"]


def strides_of(make) -> tuple[tuple[int, ...], ...]:
    return tuple(make(n).stride() for n in range(3))


LAYOUTS = {
    "contiguous": (lambda _: torch.empty(2, 4, 128, 64), True, True),
    "tokens first": (lambda _: torch.empty(2, 128, 4, 64).transpose(1, 2), False, True),
    "tokens first, one sequence": (lambda n: torch.empty(1, 128, 3, 4, 64)[:, :, n].transpose(1, 2), True, True),
    "packed, one head": (lambda n: torch.empty(2, 128, 3, 1, 64)[:, :, n].transpose(1, 2), True, True),
    "dim not last": (lambda _: torch.empty(2, 4, 64, 128).transpose(2, 3), False, False),
    "expanded": (lambda _: torch.empty(2, 1, 128, 64).expand(2, 4, 128, 64), False, False),
    "odd rows": (lambda _: torch.empty(2, 4, 128, 68)[..., :64], False, False),
}


@pytest.mark.parametrize(("make", "strided", "dense"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_are_views(make, strided, dense):
    """What `fits` says yes to becomes a view of the same memory."""
    x = make(0)
    for dilation, wanted in ((16, strided), (1, dense)):
        assert vendor.fits(tuple(x.shape), x.stride(), dilation) == wanted
        if wanted:
            view = vendor.classed(x, dilation)
            assert view.data_ptr() == x.data_ptr()
            assert view.shape == ((x.shape[0] * x.shape[1], 16, 8, 64) if dilation > 1 else x.shape)
    refused = vendor.refusals(Request(ls.Strided(16), *[tuple(x.shape)] * 3, torch.bfloat16, "cuda", strides_of(make)))
    assert refused == (
        [] if strided else ["q, k or v lies in memory so that its classes are no view; make it contiguous"]
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 4, 12])
def test_dense_attention_on_the_view_is_strided_attention(stride, causal):
    inputs = [x.detach() for x in make_inputs(2, 3, 3, 48, 48, 8)]
    q, k, v = (vendor.classed(x, stride) for x in inputs)
    rows = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    out, lse = plain(q, k, v, rows.tril() if causal else rows)
    wanted = ls.attention(*inputs, ls.Strided(stride, causal=causal), backend="reference", return_lse=True)
    for x, truth in zip((out, lse), wanted, strict=True):
        got = vendor.whole(x, 2, stride)
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)
    assert torch.equal(vendor.whole(vendor.classed(inputs[0], stride), 2, stride), inputs[0])


def test_flash_attn_4_takes_windows_and_shared_key_heads(monkeypatch):
    monkeypatch.setattr(vendor, "_flash_attn_4", lambda: object())
    assert vendor.classes_of(ls.Local(64), 4096, 4) == (1, True, 64)
    assert vendor.classes_of(ls.Dilated(8, 64), 4096, 4) == (64, True, 8)
    taken = (request(ls.Local(64), kv_heads=2), request(ls.Dilated(8, 64)), request(ls.Causal(), kv_heads=1))
    for asked in taken:
        assert vendor.refusals(asked) == []
    assert "window of 64 attention of flash-attn-4 over 4,096 rows" in vendor.describe(taken[0])
    assert vendor.prefers(request(ls.Local(512))) is not None
    assert vendor.prefers(request(ls.Local(256))) is None
    assert any("which is not installed or does not fit" in x for x in vendor.refusals(request(ls.Local(64), dim=32)))
    assert any("in classes it wants as many" in x for x in vendor.refusals(request(kv_heads=2)))


@pytest.fixture
def gpu(monkeypatch):
    """As on a CUDA device, where Triton's kernels take everything."""
    monkeypatch.setattr(triton, "refusals", lambda _: [])
    monkeypatch.setattr(triton, "describe", lambda _: "kernels of our own")
    monkeypatch.setattr(triton, "forward_varlen", None, raising=False)


CHOICES = [  # pattern, length, head_dim: what runs forward and backward
    (ls.Strided(64), 4096, 64, "triton"),  # classes that its own kernels hold on chip
    (ls.Strided(64), 4096, 128, "triton"),
    (ls.Strided(128), 12288, 128, "vendor+triton"),
    (ls.Strided(256), 65536, 64, "vendor+triton"),
    (ls.Strided(1024), 1 << 20, 64, "vendor"),
    (ls.Causal(), 4096, 64, "vendor"),
    (ls.Causal(), 256, 64, "vendor+triton"),
    (ls.Local(128), 4096, 64, "triton"),
    (ls.Local(64) | ls.Strided(64), 4096, 64, "triton"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("pattern", "length", "dim", "wanted"), CHOICES, ids=str)
def test_each_half_runs_where_it_is_fastest(pattern, length, dim, wanted):
    asked = request(pattern, length, dim=dim)
    assert both_halves(asked) == wanted
    assert both_halves(asked, "triton") == "triton"
    explained = describe(asked)
    assert (explained.backend, explained.backward) == (wanted.partition("+")[0], wanted.rpartition("+")[2])
    if "+" in wanted:
        assert "backend triton: chosen for the backward (the fastest that takes the request)" in str(explained)


@pytest.mark.usefixtures("gpu")
def test_deterministic_algorithms_leave_the_backward_to_its_own_kernels():
    asked = request(ls.Strided(1024), 1 << 20)
    assert both_halves(replace(asked, deterministic=True)) == "vendor+triton"


@pytest.mark.usefixtures("gpu")
def test_what_it_refuses_runs_elsewhere(monkeypatch):
    assert choose(request(ls.Causal(), 256), "vendor")[0] == "vendor"
    with pytest.raises(ls.UnsupportedError, match="packed documents"):
        choose(request(ls.Causal(), varlen=True), "vendor")
    with pytest.raises(ls.UnsupportedError, match="no gradient through the log-sum-exp"):
        choose(request(ls.Causal(), through_lse=True), "vendor")
    assert both_halves(request(ls.Causal(), through_lse=True)) == "triton"
    text = str(describe(request(ls.Strided(8))))
    assert "dense causal attention of cudnn over 512 rows in each of 8 classes, a view" in text
    monkeypatch.setattr(triton, "refusals", lambda _: ["not here"])
    assert both_halves(request(ls.Local(64))) == "torch"


@pytest.mark.usefixtures("gpu")
def test_a_call_takes_its_halves_from_two_backends(monkeypatch):
    """The forward's out and log-sum-exp are all that the backward of the other one gets."""
    ran = []
    monkeypatch.setattr(custom_ops, "BACKENDS", {"vendor": vendor, "triton": triton, "torch": torch_backend})
    monkeypatch.setattr(vendor, "forward", lambda *a: (ran.append("vendor"), torch_backend.forward(*a))[1])
    monkeypatch.setattr(triton, "backward", lambda *a: (ran.append("triton"), torch_backend.backward(*a))[1])
    inputs = make_inputs(1, 2, 2, 64, 64, 8, dtype=torch.float64)
    out, _ = custom_ops.batched(*inputs, ls.Strided(8), 0.3, "vendor+triton", wants_lse=False)
    grads = torch.autograd.grad(out.sum(), inputs)
    wanted = torch.autograd.grad(ls.attention(*inputs, ls.Strided(8), scale=0.3, backend="torch").sum(), inputs)
    assert ran == ["vendor", "triton"]
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


class FlashAttention4:
    """Its two functions, computed plainly: by token, and into the tensors that they are given."""

    @staticmethod
    def _flash_attn_fwd(q, k, v, *, softmax_scale, causal, window_size_left, return_lse, out):
        by_head = [x.transpose(1, 2) for x in (q, k, v)]
        pattern = window(causal, window_size_left)
        truth, lse = ls.attention(*by_head, pattern, scale=softmax_scale, backend="reference", return_lse=True)
        out.copy_(truth.transpose(1, 2))
        return out, lse if return_lse else None

    @staticmethod
    def _flash_attn_bwd(q, k, v, out, grad_out, lse, *, softmax_scale, causal, window_size_left, dq, dk, dv):
        assert lse.is_contiguous()
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        known = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
        grads = torch_backend.backward(known[0], None, *known[1:], lse, window(causal, window_size_left), softmax_scale)
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad.transpose(1, 2))


def window(causal, left):
    return ls.Local(left + 1) if left is not None else ls.Causal() if causal else ls.Full()


#: Of q [batch, heads, length, dim] as its name says: by head, by token, and with the batch inside.
IN_MEMORY = {"bhtd": (0, 1, 2, 3), "bthd": (0, 2, 1, 3), "tbhd": (2, 0, 1, 3)}


@pytest.mark.parametrize(
    ("pattern", "order", "batch"),
    [
        (pattern, order, batch)
        for pattern in (ls.Causal(), ls.Local(24), ls.Full(), ls.Dilated(6, 4))
        for order, batch in (("bhtd", 2), ("bthd", 1), ("bthd", 2), ("tbhd", 2))
        # The classes of two sequences by token are no view.
        if (order, batch, pattern) != ("bthd", 2, ls.Dilated(6, 4))
    ],
    ids=str,
)
def test_flash_attn_4_writes_where_it_is_told(monkeypatch, pattern, order, batch):
    """Into results of ours that lie in memory as q, k and v do."""
    monkeypatch.setattr(vendor, "_flash_attn_4", lambda: FlashAttention4)
    places = IN_MEMORY[order]
    back = [places.index(place) for place in range(4)]
    by_head = make_inputs(batch, 4, 4, 64, 64, 64, dtype=torch.float64)
    inputs = [x.detach().permute(places).contiguous().permute(back).requires_grad_() for x in by_head]
    with torch.no_grad():
        out, lse = vendor.forward(*inputs, pattern, 0.2)
        assert torch.equal(vendor.forward_only(*inputs, pattern, 0.2), out)
        grads = vendor.backward(torch.ones_like(out), None, *inputs, out, lse, pattern, 0.2)
        into = heads_of(torch.full((batch, 64, 3 * 256), float("nan"), dtype=torch.float64), 4, 256)
        assert vendor.backward(torch.ones_like(out), None, *inputs, out, lse, pattern, 0.2, into) is into
        for place, grad in zip(into, grads, strict=True):
            assert torch.equal(place, grad)
    truth, truth_lse = ls.attention(*inputs, pattern, scale=0.2, backend="reference", return_lse=True)
    wanted = (truth, truth_lse, *torch.autograd.grad(truth.sum(), inputs))
    for found, expected in zip((out, lse, *grads), wanted, strict=True):
        by_token = found.dim() == 4 and order != "bhtd"
        assert (found.transpose(1, 2) if by_token else found).is_contiguous()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("gpu")
def test_no_log_sum_exp_where_nobody_asks_for_it(monkeypatch):
    monkeypatch.setattr(custom_ops, "BACKENDS", {"vendor": vendor})
    monkeypatch.setattr(vendor, "_flash_attn_4", lambda: FlashAttention4)
    inputs = [x.detach() for x in make_inputs(1, 2, 2, 64, 64, 64, dtype=torch.float64)]
    for wants_lse in (True, False):
        out, lse = custom_ops.batched(*inputs, ls.Local(24), 0.3, "vendor", wants_lse)
        assert (lse is not None) == wants_lse
        torch.testing.assert_close(out, ls.attention(*inputs, ls.Local(24), scale=0.3, backend="reference"))
