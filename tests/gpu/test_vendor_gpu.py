"""The vendors' kernels on a CUDA device against the float64 reference: outputs, log-sum-exp and gradients."""

from __future__ import annotations

import pytest
import torch

import longstride as ls
from longstride.attention import attention_stacked
from longstride.backends import vendor
from longstride.backends.layout import by_token, heads_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # flash-attn-4's own, while it compiles, in whichever test comes first
]

PATTERNS = [
    ls.Causal(),
    ls.Full(),
    ls.Strided(2),
    ls.Strided(8),
    ls.Strided(64),
    ls.Strided(8, causal=False),
    ls.Dilated(1000, 16),
]

#: (forward, backward): the largest relative error ||a - b|| / ||b|| against float64 on the same rounded inputs.
TOLERANCE = {torch.float16: (2e-3, 5e-3), torch.bfloat16: (1e-2, 3e-2)}


@pytest.fixture(params=["cudnn", "flash", "flash-attn-4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the kernels, where this machine has it."""
    if request.param == "flash-attn-4":
        if vendor._flash_attn_4() is None:
            pytest.skip("flash-attn-4 is not installed, or this is no Hopper device")
        return request.param
    if request.param == "cudnn" and vendor.kernel() != "cudnn":
        pytest.skip("this PyTorch has no cuDNN attention for this device")
    monkeypatch.setattr(vendor, "kernel", lambda: request.param)
    monkeypatch.setattr(vendor, "_flash_attn_4", lambda: None)
    return request.param


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


def assert_near(inputs: list[torch.Tensor], pattern: ls.Pattern, scale: float | None = None) -> None:
    """out, lse, and the gradients of out against the reference."""
    dtype = inputs[0].dtype
    weight = torch.randn_like(inputs[0])
    results = []
    for as_dtype, backend in ((dtype, "vendor"), (torch.float64, "reference")):
        # Leaves as they lie in memory: the layout is a part of what is tested.
        leaves = [x.to(as_dtype).requires_grad_() if as_dtype != dtype else x.detach().requires_grad_() for x in inputs]
        with torch.no_grad():
            _, lse = ls.attention(*leaves, pattern, backend=backend, scale=scale, return_lse=True)
        out = ls.attention(*leaves, pattern, backend=backend, scale=scale)
        results.append([out, lse, *torch.autograd.grad((out * weight.to(as_dtype)).sum(), leaves)])
    out = results[0][0]
    assert (out.transpose(1, 2) if by_token(inputs[0]) else out).is_contiguous()
    forward, backward = TOLERANCE[dtype]
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        error = relative_error(found, expected)
        assert error <= (forward if index < 2 else backward), (("out", "lse", "dq", "dk", "dv")[index], error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.usefixtures("kernel")
def test_out_lse_and_gradients(pattern: ls.Pattern, dtype: torch.dtype) -> None:
    for length in (256, 576, 1024):
        if length % (vendor.classes_of(pattern, length, 4) or (1,))[0]:
            continue
        for head_dim in (8, 40, 64, 128):
            torch.manual_seed(length + head_dim)
            inputs = [torch.randn(2, 4, length, head_dim, device="cuda", dtype=dtype) for _ in range(3)]
            assert_near(inputs, pattern)


@pytest.mark.usefixtures("kernel")
def test_lengths_that_no_tile_divides() -> None:
    for pattern, length in ((ls.Causal(), 203), (ls.Full(), 77), (ls.Strided(5), 505), (ls.Strided(100), 200)):
        torch.manual_seed(length)
        assert_near([torch.randn(1, 3, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)], pattern)


@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.2])
@pytest.mark.usefixtures("kernel")
def test_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for pattern in (ls.Causal(), ls.Strided(8)):
        assert_near(inputs, pattern, scale)


@pytest.mark.usefixtures("kernel")
def test_any_layout_that_it_takes() -> None:
    torch.manual_seed(0)
    packed = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    tokens_first = [packed[:, :, n].transpose(1, 2) for n in range(3)]
    assert_near(tokens_first, ls.Causal())
    assert_near([x[:1] for x in tokens_first], ls.Strided(8))
    numbers = torch.randn(3, 2 * 4 * 256 * 64 + 3, device="cuda", dtype=torch.bfloat16)[:, 3:]
    misaligned = [each.view(2, 4, 256, 64) for each in numbers]
    assert any(each.data_ptr() % 16 for each in misaligned)
    assert_near(misaligned, ls.Strided(8))
    with pytest.raises(ls.UnsupportedError, match="make it contiguous"):
        ls.attention(*tokens_first, ls.Strided(8), backend="vendor")


@pytest.mark.usefixtures("kernel")
def test_gradients_side_by_side() -> None:
    """Written where they belong, in classes of several sequences by a copy of the kernel's own."""
    for batch, pattern in ((1, ls.Causal()), (2, ls.Full()), (1, ls.Strided(8)), (2, ls.Causal())):
        torch.manual_seed(batch)
        rows = torch.randn(batch, 512, 3 * 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(batch, 4, 512, 64, device="cuda", dtype=torch.bfloat16)
        out = attention_stacked(rows, pattern, heads=4, qk_width=256, backend="vendor")
        (found,) = torch.autograd.grad((out * weight).sum(), rows)
        exact = rows.detach().double().requires_grad_()
        truth = ls.attention(*heads_of(exact, 4, 256), pattern, backend="reference")
        (expected,) = torch.autograd.grad((truth * weight).sum(), exact)
        assert relative_error(out, truth) < 1e-2
        for ours, theirs in zip(heads_of(found, 4, 256), heads_of(expected, 4, 256), strict=True):
            assert relative_error(ours, theirs) < 3e-2


@pytest.mark.skipif(vendor._flash_attn_4() is None, reason="flash-attn-4 is not installed, or this is no Hopper device")
def test_windows_and_shared_key_heads() -> None:
    for pattern, kv_heads in ((ls.Local(100), 4), (ls.Local(600), 1), (ls.Causal(), 2), (ls.Dilated(20, 4), 4)):
        for head_dim in (64, 128):
            torch.manual_seed(head_dim)
            shapes = ((2, 4, 1024, head_dim), (2, kv_heads, 1024, head_dim), (2, kv_heads, 1024, head_dim))
            assert_near([torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes], pattern)


def test_more_batch_rows_than_a_grid_takes_are_refused() -> None:
    x = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(70_000, 1, 16, 64)
    with pytest.raises(ls.UnsupportedError, match="65,535 rows of a batch"):
        ls.attention(x, x, x, ls.Causal(), backend="vendor")


def test_gradients_through_the_lse_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with pytest.raises(ls.UnsupportedError, match="no gradient through the log-sum-exp"):
        ls.attention(q, k, v, ls.Causal(), backend="vendor", return_lse=True)
    with torch.no_grad():
        ls.attention(q, k, v, ls.Causal(), backend="vendor", return_lse=True)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
def test_compiled_it_is_the_same() -> None:
    inputs = [torch.randn(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ls.attention(q, k, v, ls.Strided(2), backend="vendor").float().square().sum()

    wanted, got = (torch.autograd.grad(f(*inputs), inputs) for f in (step, torch.compile(step, fullgraph=True)))
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < 1e-2


def test_nothing_is_copied() -> None:
    """The forward holds the output, the log-sum-exp twice, and no copy of q, k or v."""
    q, k, v = (torch.randn(1, 8, 2**16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ls.attention(*(x[:, :, :4096].contiguous() for x in (q, k, v)), ls.Strided(64), backend="vendor")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ls.attention(q, k, v, ls.Strided(64), backend="vendor")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * q.nbytes
