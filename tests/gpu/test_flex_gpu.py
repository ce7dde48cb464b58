"""FlexAttention on a CUDA device against the float64 reference: outputs, log-sum-exp and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch._inductor.config as inductor

import longstride as ls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@dataclass(frozen=True, repr=False)
class EveryThird(ls.Pattern):
    """A user's own rule: every third key back, and one key that all may read."""

    shared: int = 5

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ((i - j) % 3 == 0) & (j <= i) | (j == self.shared)


@dataclass(frozen=True, repr=False)
class Later(ls.Pattern):
    """A user's own rule that leaves the first rows without keys."""

    start: int = 40

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i >= self.start)


@dataclass(frozen=True, repr=False)
class Untraceable(ls.Pattern):
    """A rule that looks at numbers, as no compiler can follow it."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i.max().item() >= 0)


PATTERNS = [
    EveryThird(),
    EveryThird() | ls.Local(20),
    EveryThird() & ls.Local(70),
    Later(),
    ls.per_head(EveryThird(), ls.Local(9)),
    ls.per_head(EveryThird(), ls.Causal(), Later(), EveryThird(9)),
    ls.Local(17),
    ls.Strided(16) | ls.Fixed(32, 4),
    ls.Global(5),
]
LENGTHS = [(256, 256), (203, 203), (1, 150), (77, 200)]

#: (forward, backward): the largest relative error ||a - b|| / ||b|| against float64 on the same rounded inputs.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 5e-3), torch.bfloat16: (1e-2, 3e-2)}


@pytest.fixture(autouse=True)
def one_compiler() -> Iterator[None]:
    """One process at a time: the compiler's pool costs more than these kernels."""
    with inductor.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
@pytest.mark.parametrize(
    ("dtype", "size", "dims"),
    [
        (torch.bfloat16, LENGTHS[0], (64, 64, 4)),
        (torch.bfloat16, LENGTHS[1], (32, 64, 2)),
        (torch.float16, LENGTHS[2], (64, 64, 2)),
        (torch.float32, LENGTHS[3], (48, 16, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_out_lse_and_gradients(
    pattern: ls.Pattern, dtype: torch.dtype, size: tuple[int, int], dims: tuple[int, int, int]
) -> None:
    (q_len, kv_len), (head_dim, v_dim, kv_heads) = size, dims
    torch.manual_seed(q_len)
    shapes = ((4, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, v_dim))
    inputs = [torch.randn(2, *shape, device="cuda", dtype=dtype) for shape in shapes]
    weight = torch.randn(2, 4, q_len, v_dim, device="cuda", dtype=dtype)
    lse_weight = torch.randn(2, 4, q_len, device="cuda")
    results = []
    for as_dtype, backend in ((dtype, "flex"), (torch.float64, "reference")):
        leaves = [x.to(as_dtype).requires_grad_() for x in inputs]
        out, lse = ls.attention(*leaves, pattern, backend=backend, return_lse=True)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = (out * weight.to(as_dtype)).sum() + (finite * lse_weight).sum()
        results.append([out, finite, *torch.autograd.grad(loss, leaves), (lse == float("-inf")).double()])
    forward, backward = TOLERANCE[dtype]
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        assert not found.isnan().any()
        error = relative_error(found, expected)
        assert error <= (backward if 2 <= index < 5 else forward), (index, error)


@pytest.mark.filterwarnings("ignore")
def test_rows_without_keys_are_zero_everywhere() -> None:
    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda", requires_grad=True) for _ in range(3))
    out, lse = ls.attention(q, k, v, Later(), backend="flex", return_lse=True)
    assert not out[:, :, :40].any()
    assert (lse[:, :, :40] == float("-inf")).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not grads[0][:, :, :40].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.filterwarnings("ignore")
def test_it_is_chosen_for_rules_of_ones_own() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    explanation = ls.explain(q, q, q, EveryThird() | ls.Local(4))
    assert explanation.backend == "flex"
    assert "the user's own" in str(explanation)
    assert ls.explain(q, q, q, ls.Local(4)).backend != "flex"
    # More patterns than the compiler would recompile one function for.
    for shared in range(12):
        found = ls.attention(q, q, q, EveryThird(shared))
        wanted = ls.attention(*(q.double() for _ in range(3)), EveryThird(shared), backend="reference")
        assert relative_error(found, wanted) < 1e-2


@pytest.mark.filterwarnings("ignore")
def test_a_rule_that_cannot_be_traced_says_so() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ls.UnsupportedError, match=r"could not compile Untraceable\(\).*backend='torch'"):
        ls.attention(q, q, q, Untraceable(), backend="flex")


@pytest.mark.filterwarnings("ignore")
def test_a_long_mask_costs_its_blocks() -> None:
    """`create_block_mask` would take more than 4 GB for this one."""
    q = torch.randn(1, 1, 2**16, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    ls.attention(q, q, q, EveryThird() & ls.Local(256), backend="flex")
    assert torch.cuda.max_memory_allocated() < 3 * 2**30
