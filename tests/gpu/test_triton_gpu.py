"""The Triton kernels on a CUDA device against float64: random cases, hidden keys, long sequences, graphs, bad input.

What compiles is what costs: a kernel is compiled for a pattern's numbers, dims, dtype, and whether lengths and strides
are multiples of 16. So cases are drawn in series, which differ in batch and lengths alone.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch._inductor.config as inductor
from tests.oracle import FLOOR, TIMES_PLAIN, plain
from tests.strategies import Thirds, random_table
from torch.utils.checkpoint import checkpoint

import longstride as ls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS = 4
LONGEST = 720

POOL: list[ls.Pattern] = [
    ls.Causal(),
    ls.Full(),
    # Windows, within a tile and over many, one- and two-sided.
    ls.Local(1),
    ls.Local(17),
    ls.Local(64),
    ls.Local(128),
    ls.Local(300),
    ls.Local(33, lookahead=32),
    ls.Local(5, lookahead=130),
    ls.Local(1, lookahead=2),
    ls.Dilated(9, 4),
    ls.Dilated(30, 7),
    ls.Dilated(5, 3, lookahead=4),
    ls.Dilated(2, 64),
    # Residue classes: packed several a tile, in one tile, in two, too long for either, longer than the sequence.
    ls.Strided(2),
    ls.Strided(3),
    ls.Strided(5, causal=False),
    ls.Strided(8),
    ls.Strided(13),
    ls.Strided(16),
    ls.Strided(32, causal=False),
    ls.Strided(96),
    ls.Strided(128),
    ls.Strided(1000),
    # Blocks: in one tile, in two, longer; odd and even.
    ls.BlockLocal(16),
    ls.BlockLocal(32),
    ls.BlockLocal(48, causal=False),
    ls.BlockLocal(96),
    ls.BlockLocal(100, causal=False),
    ls.BlockLocal(128),
    ls.BlockLocal(300),
    ls.Summary(32, 4),
    ls.Summary(17, 5, 3),
    ls.Fixed(32, 8),
    ls.Fixed(64, 4),
    ls.Fixed(50, 50),
    ls.LogSparse(),
    ls.LogSparse(3, causal=False),
    ls.Global(5),
    ls.Global((3, 70, 131, 500), causal=False),
    ls.RandomBlocks(16, 2),
    ls.RandomBlocks(31, 3, causal=False),
    ls.RandomBlocks(64, 2),
    ls.RandomBlocks(128, 2, seed=4),
    ls.BlockSparse(random_table(0, 24, length=LONGEST), 24),
    ls.BlockSparse(random_table(1, 64, HEADS, length=LONGEST), 64),
    # Several parts: in one launch, merged over launches, less one another.
    ls.Local(24) | ls.Strided(24),
    ls.Local(128) | ls.Strided(128),
    ls.Local(20) | ls.Strided(3) | ls.Strided(4),
    ls.Strided(16) | ls.Fixed(32, 4) | ls.Global(3),
    ls.Local(70) | ls.Fixed(64, 8),
    ls.Local(40) & ls.Fixed(64, 8),
    ls.Strided(5) & ls.Summary(30, 10),
    ls.LogSparse() | ls.RandomBlocks(16, 2),
    ls.Local(9) | ls.LogSparse(4) | ls.Strided(50),
    ls.longformer(64, 4),
    ls.longformer(32, (0, 300, 650)),
    ls.bigbird(16),
    ls.bigbird(64),
    ls.BlockLocal(64) | ls.RandomBlocks(32, 2) | ls.Global((1, 100)),
    # Heads that differ.
    ls.per_head(ls.Local(24), ls.Strided(24)),
    ls.per_head(ls.Strided(16), ls.BlockLocal(32), ls.LogSparse(), ls.Summary(32, 4)),
    ls.per_head(ls.Global((2, 70)), ls.Full()) | ls.Local(30),
    ls.per_head(ls.Summary(40, 8), ls.Local(3) & ls.Global((2000,))),  # two heads have no pair at all
]

#: (dtype, head_dim, v_head_dim)
SETTINGS = [
    (torch.bfloat16, 64, 64),
    (torch.bfloat16, 128, 128),
    (torch.bfloat16, 64, 128),
    (torch.bfloat16, 80, 48),
    (torch.bfloat16, 256, 256),
    (torch.float16, 64, 64),
    (torch.float16, 96, 96),
    (torch.float16, 16, 32),
    (torch.float16, 20, 5),
    (torch.float32, 64, 64),
    (torch.float32, 48, 16),
    (torch.float32, 128, 128),
]
LAYOUTS = ("contiguous", "tokens first", "packed", "every other", "shared")

#: For every pattern: so many series, and so many cases in each.
SERIES, DRAWS = 6, 6


@dataclass(frozen=True)
class Series:
    pattern: ls.Pattern
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    kv_heads: int
    layout: str
    grad_layout: str
    through_lse: bool
    scale: float | None
    sizes: tuple[tuple[int, int, int], ...]  # batch, q_len, kv_len


def series_of(index: int, number: int) -> Series:
    """The number-th series of the index-th pattern."""
    draw = random.Random(f"{index} {number}")
    dtype, head_dim, v_dim = SETTINGS[(5 * index + number) % len(SETTINGS)]
    base = draw.choice([40, 100, 200, 330, 500, 700])
    partial, multiple = draw.random() < 0.4, draw.random() < 0.4
    sizes = []
    for _ in range(DRAWS):
        kv_len = draw.randint(base * 9 // 10, base)
        kv_len = max(16, kv_len // 16 * 16) if multiple else kv_len | 1
        q_len = kv_len
        if partial:
            q_len = draw.choice([1, draw.randint(1, 16), draw.randint(1, kv_len), draw.randint(1, kv_len)])
        sizes.append((draw.choice([1, 1, 2, 3]), q_len, kv_len))
    return Series(
        POOL[index],
        dtype,
        head_dim,
        v_dim,
        draw.choice([HEADS, HEADS, 2, 1]),
        draw.choice(LAYOUTS),
        draw.choice(["contiguous", "tokens first", "expanded"]),
        draw.random() < 0.5,
        draw.choice([None, None, None, 0.2, -0.1, 0.0]),
        tuple(sizes),
    )


def laid_out(layout: str, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers [batch, heads, length, dim]."""
    options = {"device": "cuda", "dtype": dtype}
    match layout:
        case "tokens first":
            return torch.randn(batch, length, heads, dim, **options).transpose(1, 2)
        case "packed":  # as one of q, k and v of a single projection
            return torch.randn(batch, length, 3, heads, dim, **options)[:, :, 1].transpose(1, 2)
        case "every other":
            return torch.randn(batch, heads, length, 2 * dim, **options)[..., ::2]
        case "shared":
            return torch.randn(1, heads, length, dim, **options).expand(batch, heads, length, dim)
        case "expanded":
            return torch.randn(batch, heads, 1, 1, **options).expand(batch, heads, length, dim)
    return torch.randn(batch, heads, length, dim, **options)


def names_and_results(compute, inputs, weight, lse_weight) -> dict[str, torch.Tensor]:
    out, lse = compute(*inputs)
    outputs, weights = ((out, lse), (weight, lse_weight)) if lse_weight is not None else ((out,), (weight,))
    grads = torch.autograd.grad(outputs, inputs, weights)
    return dict(zip(TIMES_PLAIN, (out.detach(), lse.detach(), *grads), strict=True))


def mask_of(pattern: ls.Pattern, q_len: int, kv_len: int, heads: int = HEADS) -> torch.Tensor:
    return pattern.mask(q_len, kv_len, heads=heads).cuda()


def rounding_of_delta(dtype, q, k, v, weight, scale) -> float:
    """What grad_q and grad_k may miss by where the truth is exactly 0: over a single key grad_out . v - delta is 0.

    The plain computation hits that. Kernels that take delta from the output sum the same products in another order,
    and miss by a rounding of float32 of their absolute sum, times scale and a number of k or q.
    """
    if dtype != torch.float32:
        return 0.0
    v = v.abs().repeat_interleave(weight.shape[1] // v.shape[1], 1)
    products = (weight.abs() @ v.mT).max().item()
    largest = max(q.abs().max().item(), k.abs().max().item())
    return torch.finfo(torch.float32).eps * products * abs(scale) * largest


def assert_precise(got, truth, usual, dtype, case, rounding: float = 0.0) -> None:
    """The table of tests/oracle.py.

    The floor of a gradient is relative to the largest of the three, or `rounding` if that is more: over a single key
    grad_q and grad_k are exactly 0, which the plain computation hits, and kernels that take delta from the output miss
    by a rounding of grad_v's size.
    """
    largest = max(truth[name].abs().max().item() for name in ("grad_q", "grad_k", "grad_v"))
    for name, factor in TIMES_PLAIN.items():
        error, allowed = ((x[name].double() - truth[name]).abs() for x in (got, usual))
        floor = FLOOR[dtype] * (largest if name.startswith("grad") else truth[name].abs().max().item())
        floor = max(floor, rounding) if name in ("grad_q", "grad_k") else floor
        for measure in (torch.max, lambda x: x.square().mean().sqrt()):
            most, found = factor * measure(allowed).item() + floor, measure(error).item()
            assert found <= most, f"{name}: {found:.3g} > {most:.3g}; {case}"


def check(series: Series, batch: int, q_len: int, kv_len: int, again: bool) -> None:
    case = f"{series}; batch {batch}, q_len {q_len}, kv_len {kv_len}"
    mask = mask_of(series.pattern, q_len, kv_len)
    dims, heads = (series.head_dim, series.head_dim, series.v_dim), (HEADS, series.kv_heads, series.kv_heads)
    shapes = zip(heads, (q_len, kv_len, kv_len), dims, strict=True)
    inputs = [laid_out(series.layout, batch, *shape, series.dtype).requires_grad_() for shape in shapes]
    weight = laid_out(series.grad_layout, batch, HEADS, q_len, series.v_dim, series.dtype)
    lse_weight = torch.randn(batch, HEADS, q_len, device="cuda") if series.through_lse else None
    scale = series.head_dim**-0.5 if series.scale is None else series.scale

    def attend(q, k, v):
        return ls.attention(q, k, v, series.pattern, scale=series.scale, backend="triton", return_lse=True)

    got = names_and_results(attend, inputs, weight, lse_weight)
    for name, x in got.items():
        assert not x.isnan().any(), f"{name} has NaN; {case}"
    if again:
        rerun = names_and_results(attend, inputs, weight, lse_weight)
        assert all(torch.equal(rerun[name], x) for name, x in got.items()), f"a rerun differs; {case}"

    # Rows without keys: exact zeros, whatever flows into them. The plain computation has no answer there: it is given
    # one key, and no gradient.
    empty = ~mask.any(-1)
    assert not got["out"][:, empty].any(), case
    assert (got["lse"][:, empty] == -math.inf).all(), case
    assert not got["grad_q"][:, empty].any(), case
    assert got["lse"][:, ~empty].isfinite().all(), case
    mask = mask | (empty[..., None] & (torch.arange(kv_len, device="cuda") == 0))
    weight = weight.masked_fill(empty[..., None], 0.0)
    got["lse"] = got["lse"].masked_fill(empty, 0.0)
    if lse_weight is not None:
        lse_weight = lse_weight.masked_fill(empty, 0.0)

    def by_hand(dtype):
        def compute(q, k, v):
            out, lse = plain(q, k, v, mask, scale)
            return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, 0.0)

        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        into_lse = None if lse_weight is None else lse_weight.to(dtype)
        return names_and_results(compute, copies, weight.to(dtype), into_lse)

    with torch.no_grad():
        rounding = rounding_of_delta(series.dtype, *inputs, weight, scale)
    assert_precise(got, by_hand(torch.float64), by_hand(series.dtype), series.dtype, case, rounding)


@pytest.mark.parametrize("number", range(SERIES))
@pytest.mark.parametrize("index", range(len(POOL)), ids=lambda index: f"{index} {POOL[index]}"[:60])
def test_random_cases(index: int, number: int, record_property) -> None:
    torch.manual_seed(1000 * index + number)
    series = series_of(index, number)
    for n, size in enumerate(series.sizes):
        check(series, *size, again=n == 0)
    record_property("cases: attention", len(series.sizes))


def test_the_random_cases_are_many() -> None:
    drawn = [(i, size) for i in range(len(POOL)) for n in range(SERIES) for size in series_of(i, n).sizes]
    print(f"{len(drawn):,} random cases of {len(POOL)} patterns")
    assert len(drawn) >= 2000
    assert {size[1] < size[2] for _, size in drawn} == {True, False}
    every = [series_of(i, n) for i in range(len(POOL)) for n in range(SERIES)]
    assert {series.layout for series in every} == set(LAYOUTS)
    assert {(series.dtype, series.head_dim, series.v_dim) for series in every} == set(SETTINGS)


def test_uninitialised_memory_is_poisoned() -> None:
    """What the backend allocates and never writes shows as NaN in all of these tests."""
    x = torch.zeros(3, device="cuda")
    for made in (x.new_empty(4), torch.empty(4, device="cuda"), torch.empty_strided((4,), (1,), device="cuda")):
        assert made.isnan().all()


# ---- what may be seen, and what not ---------------------------------------------------------------------------------

PATTERNS = pytest.mark.parametrize("pattern", POOL, ids=lambda pattern: str(pattern)[:60])


@PATTERNS
def test_the_mask_can_be_read_off_the_output(pattern: ls.Pattern) -> None:
    """q = 0 weighs all allowed keys alike, and v = identity shows which they are."""
    for q_len, kv_len in ((128, 128), (113, 113), (50, 127), (1, 100)):
        q = torch.zeros(1, HEADS, q_len, 64, device="cuda", dtype=torch.float16)
        k = torch.randn(1, 1, kv_len, 64, device="cuda", dtype=torch.float16)
        v = torch.eye(kv_len, 128, device="cuda", dtype=torch.float16)[None, None]
        out, lse = ls.attention(q, k, v, pattern, backend="triton", return_lse=True)
        mask = mask_of(pattern, q_len, kv_len)
        assert torch.equal(out[0, :, :, :kv_len] > 0, mask), f"{q_len}, {kv_len}"
        assert not out[0, :, :, kv_len:].any()
        torch.testing.assert_close(lse[0].exp(), mask.sum(-1).float(), rtol=1e-4, atol=0)


def poison(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The largest numbers there are, of either sign, wherever nobody looks: products overflow to inf - inf."""
    signs = torch.ones(x.shape[-1], device="cuda", dtype=x.dtype)
    signs[1::2] = -1.0
    return torch.where(seen[None, :, :, None], x.detach(), torch.finfo(x.dtype).max * signs).requires_grad_()


@PATTERNS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_huge_numbers_that_a_query_may_not_see(pattern: ls.Pattern, dtype: torch.dtype) -> None:
    """Its out, log-sum-exp and gradient are the same bit by bit."""
    length = 250
    q, k, v = (torch.randn(1, HEADS, length, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    mask = mask_of(pattern, length, length)

    def row_of(row, k, v):
        out, lse = ls.attention(q, k, v, pattern, backend="triton", return_lse=True)
        into = torch.zeros_like(out).index_fill_(2, torch.tensor(row, device="cuda"), 1.0)
        (grad_q,) = torch.autograd.grad(out, q, into)
        return out[:, :, row], lse[:, :, row], grad_q[:, :, row]

    for row in (0, 100, 249):
        before = row_of(row, k, v)
        after = row_of(row, *(poison(x, mask[:, row]) for x in (k, v)))
        for name, a, b in zip(("out", "lse", "grad_q"), before, after, strict=True):
            assert torch.equal(a, b), f"{name}[{row}]"


@PATTERNS
def test_huge_numbers_that_nobody_may_see(pattern: ls.Pattern) -> None:
    """Nothing changes, in no gradient; and those keys get gradients of exactly 0."""
    for q_len in (250, 70, 1):
        shapes = ((HEADS, q_len, 64), (HEADS, 250, 64), (HEADS, 250, 64))
        q, k, v = (torch.randn(2, *x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes)
        seen = mask_of(pattern, q_len, 250).any(1)
        weight, lse_weight = torch.randn_like(q), torch.randn(2, HEADS, q_len, device="cuda")

        def attend(q, k, v):
            return ls.attention(q, k, v, pattern, backend="triton", return_lse=True)

        before = names_and_results(attend, (q, k, v), weight, lse_weight)
        after = names_and_results(attend, (q, *(poison(x, seen) for x in (k, v))), weight, lse_weight)
        for name, x in before.items():
            assert torch.equal(x, after[name]), f"{name} at {q_len} queries"
        for name in ("grad_k", "grad_v"):
            assert not after[name].masked_select(~seen[None, :, :, None]).any()


# ---- packed documents -----------------------------------------------------------------------------------------------


def documents_of(index: int) -> list[list[int]]:
    """Lists of lengths: empty documents, single tokens, one longer than all others."""
    draw = random.Random(index)
    lists = []
    for _ in range(4):
        lengths = [draw.choice([0, 1, draw.randint(1, 40), draw.randint(1, 300)]) for _ in range(draw.randint(1, 9))]
        lists.append([*lengths, draw.randint(1, 400)])
    return lists


def one_by_one(q, k, v, pattern: ls.Pattern, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain computation of each document; 0 for queries without keys, in the log-sum-exp too."""
    outs, lses = [], []
    for x in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        if length := len(x[0]):
            mask = mask_of(pattern, length, length)
            empty = ~mask.any(-1)
            mask = mask | (empty[..., None] & (torch.arange(length, device="cuda") == 0))
            out, lse = plain(*(y.transpose(0, 1)[None] for y in x), mask)
            outs.append(out[0].masked_fill(empty[..., None], 0.0).transpose(0, 1))
            lses.append(lse[0].masked_fill(empty, 0.0).T)
    return torch.cat(outs), torch.cat(lses)


def check_documents(
    pattern: ls.Pattern, setting: tuple[torch.dtype, int, int], kv_heads: int, lengths: list[int]
) -> None:
    dtype, head_dim, v_dim = setting
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    shapes = ((HEADS, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
    inputs = [torch.randn(total, *shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    weight = torch.randn(total, HEADS, v_dim, device="cuda", dtype=dtype)
    lse_weight = torch.randn(total, HEADS, device="cuda")

    def attend(q, k, v):
        return ls.attention_varlen(q, k, v, cu_seqlens, pattern, backend="triton", return_lse=True, max_seqlen=400)

    got = names_and_results(attend, inputs, weight, lse_weight)
    got["lse"] = got["lse"].masked_fill(got["lse"] == -math.inf, 0.0)
    found = []
    for as_dtype in (torch.float64, dtype):
        copies = [x.detach().to(as_dtype).requires_grad_() for x in inputs]
        into = (weight.to(as_dtype), lse_weight.to(as_dtype))
        found.append(names_and_results(lambda *x: one_by_one(*x, pattern, lengths), copies, *into))
    case = f"{pattern}, {setting}, {kv_heads} key heads, {lengths}"
    assert not any(x.isnan().any() for x in got.values()), case
    assert_precise(got, *found, dtype, case)


@pytest.mark.parametrize("index", range(0, len(POOL), 2), ids=lambda index: str(POOL[index])[:60])
def test_packed_documents(index: int, record_property) -> None:
    torch.manual_seed(index)
    lists = documents_of(index)
    if any(rule.bind(400) != rule.bind(1) for rule in POOL[index].split_heads(HEADS)):
        with pytest.raises(ls.UnsupportedError, match="depends on the length, which differs from document to document"):
            check_documents(POOL[index], SETTINGS[0], 1, lists[0])
        return
    for lengths in lists:
        check_documents(POOL[index], SETTINGS[index % 4 * 3], (4, 2, 1)[index // 2 % 3], lengths)
    record_property("cases: attention_varlen", len(lists))


# ---- long sequences -------------------------------------------------------------------------------------------------

LONG = 2**20


def assert_rows_are_right(pattern: ls.Pattern, q, k, v, rows: list[int], columns: list[int]) -> None:
    """A few rows of out, lse and grad_q, and of grad_k and grad_v, recomputed in float64. One head."""
    length, dim = q.shape[2:]
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = ls.attention(q, k, v, pattern, backend="triton", return_lse=True)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    q, k, v, out, lse, weight, *grads = (x.detach()[0, 0] for x in (q, k, v, out, lse, weight, *grads))
    everywhere = torch.arange(length, device="cuda")
    scale = dim**-0.5

    def assert_near(name, row, found, wanted, most):
        # Over a single key grad_q and grad_k are exactly 0, and found as a rounding of numbers near 1.
        error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)
        assert error <= most, f"{name}[{row}] of {pattern}: {error:.3g}"

    for row in rows:
        keys = everywhere[pattern.allows(torch.tensor(row, device="cuda"), everywhere)]
        scores = k[keys].double() @ q[row].double() * scale
        weights = scores.softmax(0)
        assert_near("lse", row, lse[row], scores.logsumexp(0), 1e-4)
        assert_near("out", row, out[row], weights @ v[keys].double(), 1e-2)
        inner = v[keys].double() @ weight[row].double()
        grad = weights * (inner - weights @ inner) * scale
        assert_near("grad_q", row, grads[0][row], grad @ k[keys].double(), 3e-2)
    for column in columns:
        queries = everywhere[pattern.allows(everywhere, torch.tensor(column, device="cuda"))]
        weights = (q[queries].double() @ k[column].double() * scale - lse[queries].double()).exp()
        inner = weight[queries].double() @ v[column].double()
        delta = (out[queries].double() * weight[queries].double()).sum(-1)
        assert_near("grad_v", column, grads[2][column], weights @ weight[queries].double(), 3e-2)
        assert_near("grad_k", column, grads[1][column], weights * (inner - delta) * scale @ q[queries].double(), 3e-2)


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Strided(1024),
        ls.Local(256),
        ls.Fixed(1024, 32),
        ls.Local(1024) | ls.Strided(1024),
        ls.LogSparse(),
        ls.RandomBlocks(128, 2),
    ],
    ids=str,
)
def test_a_million_positions(pattern: ls.Pattern) -> None:
    torch.manual_seed(0)
    for length in (LONG, LONG - 77):
        q, k, v = (torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        rows = [0, 1, 1023, 1024, 500_001, length - 1]
        assert_rows_are_right(pattern, q, k, v, rows, [0, 1, 1022, 1023, 500_000, length - 2])


@pytest.mark.parametrize("pattern", [ls.Strided(1024), ls.Local(256) | ls.Fixed(1024, 32)], ids=str)
def test_tensors_of_more_than_2_to_the_31_elements(pattern: ls.Pattern) -> None:
    """Rows of 2,200 numbers of which 64 are taken: the last ones begin past 2^31."""
    torch.manual_seed(0)
    wide = torch.zeros(LONG, 2200, device="cuda", dtype=torch.bfloat16)
    wide[:, -192:] = torch.randn(LONG, 192, device="cuda", dtype=torch.bfloat16)
    q, k, v = wide[None, None, :, -192:].split(64, 3)
    assert wide.numel() > 2**31
    assert_rows_are_right(pattern, q, k, v, [0, 5000, LONG - 1], [0, 1023, LONG - 1025])
    found = ls.attention(q, k, v, pattern, backend="triton")
    wanted = ls.attention(*(x.contiguous() for x in (q, k, v)), pattern, backend="triton")
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


def test_more_batch_rows_than_a_grid_takes() -> None:
    q, k, v = (torch.randn(70_000, 1, 20, 16, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    for pattern in (ls.Local(5), ls.Strided(4)):
        found = []
        for backend in ("triton", "torch"):
            out = ls.attention(q, k, v, pattern, backend=backend)
            found.append((out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-3)


# ---- the rest of PyTorch --------------------------------------------------------------------------------------------

MERGED = ls.Local(24) | ls.Strided(24)


def make(length: int = 200, dtype: torch.dtype = torch.bfloat16, kv_heads: int = HEADS) -> list[torch.Tensor]:
    torch.manual_seed(length)
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(2, n, length, 64, device="cuda", dtype=dtype, requires_grad=True) for n in heads]


def test_the_operator_is_registered_as_pytorch_asks() -> None:
    for pattern in ("Local(24) | Strided(24)", "LogSparse()"):
        checks = torch.library.opcheck(torch.ops.longstride.attention, (*make(), pattern, 0.125, "triton"))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
def test_compiled_in_one_graph_it_is_the_same() -> None:
    torch.compiler.reset()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = ls.attention(q * 2, k, v, MERGED, backend="triton", return_lse=True)
        return out.float().sin().sum() + lse.sum()

    inputs = make()
    with inductor.patch(compile_threads=1):  # the compiler's pool costs more than this one function
        wanted, got = (torch.autograd.grad(f(*inputs), inputs) for f in (step, torch.compile(step, fullgraph=True)))
    torch.compiler.reset()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", [MERGED, ls.Strided(8), ls.Fixed(32, 8), ls.bigbird(16)], ids=str)
def test_a_cuda_graph_replays_forward_and_backward(pattern: ls.Pattern) -> None:
    inputs, weight = make(), torch.randn(2, HEADS, 200, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out, lse = ls.attention(*inputs, pattern, backend="triton", return_lse=True)
        return (out, lse, *torch.autograd.grad(out, inputs, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and makes what is remembered
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*inputs, weight):
                x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_recomputed_in_the_backward_it_is_the_same() -> None:
    inputs = make()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ls.attention(q.sin(), k, v, MERGED, backend="triton").sin()

    wanted = torch.autograd.grad(step(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(step, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_autocast_lowers_float32() -> None:
    inputs = make(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = ls.attention(*inputs, MERGED, backend="triton")
        grads = torch.autograd.grad(out.float().sum(), inputs)
    assert out.dtype == torch.bfloat16
    assert [x.dtype for x in grads] == [torch.float32] * 3
    lowered = [x.detach().bfloat16() for x in inputs]
    assert torch.equal(out, ls.attention(*lowered, MERGED, backend="triton"))


def test_float32_products_are_exact_unless_tf32_is_allowed() -> None:
    q, k, v = make(dtype=torch.float32)
    truth = ls.attention(*(x.double() for x in (q, k, v)), MERGED, backend="reference")
    exact = ls.attention(q, k, v, MERGED, backend="triton")
    assert (exact - truth).abs().max() < 1e-5
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = ls.attention(q, k, v, MERGED, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-5 < (rounded - truth).abs().max() < 1e-2


def test_kernels_start_on_the_current_stream() -> None:
    q, k, v = (x.detach() for x in make())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        changed = q * 2
        out = ls.attention(changed, k, v, MERGED, backend="triton")
    stream.synchronize()
    assert torch.equal(out, ls.attention(q * 2, k, v, MERGED, backend="triton"))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "pattern", "words"),
    [
        ({"dtype": torch.float64}, MERGED, ["float64 is none of float16, bfloat16, float32", "torch: takes it"]),
        ({"dim": 300}, MERGED, ["head_dim 300 or v_head_dim 300 exceeds 256", "torch: takes it"]),
        ({"device": "cpu"}, MERGED, ["device cpu is not cuda", "torch: takes it"]),
        ({}, Thirds(), ["the user's own Python code", "torch: takes it"]),
        (
            {},
            ls.BlockSparse(random_table(0, 8), 8) & ls.BlockSparse(random_table(1, 16), 16),
            ["a second block table, of other blocks", "torch: takes it"],
        ),
    ],
)
def test_what_is_not_taken_names_what_takes_it(change: dict, pattern: ls.Pattern, words: list[str]) -> None:
    options = {"device": "cuda", "dtype": torch.bfloat16, "dim": 64} | change
    x = torch.zeros(1, HEADS, 64, options.pop("dim"), **options)
    with pytest.raises(ls.UnsupportedError) as raised:
        ls.attention(x, x, x, pattern, backend="triton")
    assert "'triton' was asked for" in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_a_table_that_is_too_small_is_named_before_any_launch() -> None:
    x = torch.zeros(1, HEADS, 200, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ls.PatternError, match="covers 64 positions, not 200; give a larger table"):
        ls.attention(x, x, x, ls.BlockSparse(random_table(0, 16), 16), backend="triton")


def test_wrong_offsets_are_named() -> None:
    x = torch.zeros(200, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ls.ArgumentError, match="must end at 200"):
        ls.attention_varlen(x, x, x, torch.tensor([0, 150], device="cuda"), MERGED, backend="triton")


def test_no_second_derivatives() -> None:
    q, k, v = make()
    (grad,) = torch.autograd.grad(ls.attention(q, k, v, MERGED, backend="triton").sum(), q, create_graph=True)
    with pytest.raises(ls.UnsupportedError, match="no second derivatives: pass backend='reference'"):
        torch.autograd.grad(grad.float().sum(), q)
