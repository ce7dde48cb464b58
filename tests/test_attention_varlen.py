"""Packed documents: each one is as if `attention` were called on it alone."""

import itertools

import pytest
import torch
from tests.oracle import assert_same, results
from tests.strategies import ATOMS, Thirds, random_table

import longstride as ls

MERGED = ls.Local(4) | ls.Strided(4)
BACKENDS = ["torch", "reference"]
#: Empty documents at either end and within, single tokens, two of one length that are neighbours and two that are not.
LENGTHS = [0, 13, 1, 7, 7, 0, 1, 13, 30, 0]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def offsets(lengths, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=dtype)


def make_packed(total, heads=4, kv_heads=4, dim=4, v_dim=None, dtype=torch.float64, seed=0):
    """Random q, k, v [total, heads, dim] that want gradients."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim if v_dim is None else v_dim))
    return tuple(
        torch.randn(total, *shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


def one_by_one(pattern, lengths, scale=None):
    """The definition: `attention` by the reference, document after document."""

    def compute(q, k, v):
        found = []
        for start, end in itertools.pairwise(offsets(lengths).tolist()):
            if end > start:
                document = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
                found.append(ls.attention(*document, pattern, backend="reference", scale=scale, return_lse=True))
        return torch.cat([out[0].transpose(0, 1) for out, _ in found]), torch.cat([lse[0].T for _, lse in found])

    return compute


def packed(pattern, lengths, backend=None, dtype=torch.int32, **options):
    cu_seqlens = offsets(lengths, dtype)
    return lambda q, k, v: ls.attention_varlen(
        q, k, v, cu_seqlens, pattern, backend=backend, return_lse=True, **options
    )


def assert_is_one_by_one(pattern, lengths=LENGTHS, backend=None, scale=None, through_lse=(False, True), **shape):
    inputs = make_packed(sum(lengths), **shape)
    for through in through_lse:
        wanted = results(one_by_one(pattern, lengths, scale), inputs, through_lse=through)
        assert_same(results(packed(pattern, lengths, backend, scale=scale), inputs, through_lse=through), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_an_atom_in_each_document(pattern, backend):
    assert_is_one_by_one(pattern, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "pattern",
    [
        MERGED,
        ls.bigbird(4),
        ls.longformer(6, 2),
        ls.per_head(ls.Local(5), ls.Strided(5)),
        ls.per_head(ls.Summary(6, 2), ls.LogSparse(), ls.Full(), Thirds()),
        ls.BlockSparse(random_table(0, 4, 2), 4) | ls.Local(2),
        ls.Strided(3) & ls.Summary(6, 2),
    ],
    ids=str,
)
def test_unions_heads_and_shared_keys(pattern, backend):
    assert_is_one_by_one(pattern, backend=backend, kv_heads=2, dim=6, v_dim=3, scale=0.7)
    assert_is_one_by_one(pattern, backend=backend, kv_heads=1, dim=3, v_dim=5, scale=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths", [[1], [9], [1, 1, 1], [5, 5, 5, 5], [0, 8], [8, 0, 0], [3, 20, 3, 20, 3], list(range(12))], ids=str
)
def test_any_lengths(lengths, backend):
    for pattern in (MERGED, ls.Causal(), ls.Full(), ls.Global(2)):
        assert_is_one_by_one(pattern, lengths, backend)


def test_a_document_does_not_see_another():
    q, k, v = (x.detach() for x in make_packed(30))
    cu_seqlens = offsets([10, 12, 8])
    out, lse = ls.attention_varlen(q, k, v, cu_seqlens, ls.Full(), return_lse=True)
    for x in (q, k, v):
        x[:10] = x[22:] = torch.finfo(torch.float32).max
    again, again_lse = ls.attention_varlen(q, k, v, cu_seqlens, ls.Full(), return_lse=True)
    assert torch.equal(again[10:22], out[10:22])
    assert torch.equal(again_lse[10:22], lse[10:22])


def test_documents_of_one_length_run_as_one_batch(monkeypatch):
    """The number of calls follows the number of lengths, not that of documents."""
    from longstride.backends import torch as torch_backend

    shapes, forward = [], torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda q, *others: shapes.append(q.shape) or forward(q, *others))
    q, k, v = (x.detach() for x in make_packed(9000, 1, 1))
    ls.attention_varlen(q, k, v, offsets([4, 5] * 1000), ls.Local(3))
    assert shapes == [(1000, 1, 4, 4), (1000, 1, 5, 4)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("max_seqlen", [None, 30, 100])
def test_the_offsets_and_the_longest_length(dtype, max_seqlen):
    inputs = make_packed(sum(LENGTHS))
    wanted = results(one_by_one(MERGED, LENGTHS), inputs)
    assert_same(results(packed(MERGED, LENGTHS, dtype=dtype, max_seqlen=max_seqlen), inputs), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    wide = torch.randn(4, sum(LENGTHS), 3, 12, dtype=torch.float64, requires_grad=True)
    views = [wide[:, :, n, ::2].transpose(0, 1) for n in range(3)]
    assert not views[0].is_contiguous()
    out, lse = packed(MERGED, LENGTHS, backend)(*views)
    wanted, wanted_lse = one_by_one(MERGED, LENGTHS)(*(x.contiguous() for x in views))
    for a, b in ((out, wanted), (lse, wanted_lse)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # And gradients that come in transposed.
    weights = torch.randn(6, 4, sum(LENGTHS), dtype=torch.float64).permute(2, 1, 0)
    got, expected = (torch.autograd.grad((x * weights).sum(), wide, retain_graph=True)[0] for x in (out, wanted))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_finite_differences(backend):
    inputs = make_packed(12, 2, 1, 2, 3)
    assert torch.autograd.gradcheck(packed(MERGED, [0, 5, 1, 6], backend), inputs)


def test_only_what_wants_gradients_gets_them():
    q, k, v = make_packed(sum(LENGTHS))
    cu_seqlens = offsets(LENGTHS)
    assert not ls.attention_varlen(q.detach(), k.detach(), v.detach(), cu_seqlens, MERGED).requires_grad
    out, lse = ls.attention_varlen(q, k.detach(), v.detach(), cu_seqlens, MERGED, return_lse=True)
    (from_lse,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    assert from_lse.any()
    (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(ls.UnsupportedError, match="no second derivatives: pass backend='reference'"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own, of jvp
def test_forward_mode_is_refused_not_zero():
    q, k, v = (x.detach() for x in make_packed(10))
    with pytest.raises(ls.UnsupportedError, match="no forward-mode derivatives: pass backend='reference'"):
        torch.func.jvp(lambda q: ls.attention_varlen(q, k, v, offsets([4, 6]), MERGED), (q,), (q,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_float32(backend):
    inputs = make_packed(sum(LENGTHS), dtype=torch.float32)
    lowered = [x.detach().bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = packed(MERGED, LENGTHS, backend)(*inputs)
    wanted, wanted_lse = packed(MERGED, LENGTHS, backend)(*lowered)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("pattern", [ls.Local(3), ls.per_head(ls.Local(4), ls.LogSparse())], ids=str)
def test_the_operator_is_registered_as_pytorch_asks(pattern):
    inputs = make_packed(12, 2, 1, 4, 6)
    operator = torch.ops.longstride.attention_varlen
    checks = torch.library.opcheck(operator, (*inputs, offsets([5, 0, 7]), 7, str(pattern), 0.5, "torch"))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("pattern", [MERGED, ls.per_head(ls.Local(5), ls.Strided(5)), Thirds()], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph_it_is_the_same(pattern):
    def step(q, k, v, cu_seqlens):
        out, lse = ls.attention_varlen(q * 2, k + 1, v, cu_seqlens, pattern, return_lse=True, max_seqlen=20)
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ([20, 3], [1, 7, 0, 7], [5]):
        inputs = make_packed(sum(lengths))
        wanted, got = (torch.autograd.grad(f(*inputs, offsets(lengths)), inputs) for f in (step, compiled))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_shapes_alone_give_shapes():
    q, k, v = (torch.empty(20, *shape, device="meta") for shape in ((4, 8), (2, 8), (2, 5)))
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = ls.attention_varlen(q, k, v, cu_seqlens, MERGED, return_lse=True, max_seqlen=15)
    assert out.shape == (20, 4, 5)
    assert lse.shape == (20, 4)


# ---- errors -------------------------------------------------------------------------------------------------------


def call(q=(8, 4, 6), k=(8, 2, 6), v=(8, 2, 5), cu_seqlens=(0, 3, 8), pattern=MERGED, **options):
    q, k, v = (torch.zeros(x) if isinstance(x, tuple) else x for x in (q, k, v))
    cu_seqlens = torch.tensor(cu_seqlens) if isinstance(cu_seqlens, tuple) else cu_seqlens
    return lambda: ls.attention_varlen(q, k, v, cu_seqlens, pattern, **options)


MISTAKES = [
    (call(q=(1, 4, 8, 6)), ["q has shape [1, 4, 8, 6]", "3 dims, [tokens, heads, dim]"]),
    (call(k=(9, 2, 6)), ["k [9, 2, 6]", "the same tokens"]),
    (call(v=(9, 2, 5)), ["v [9, 2, 5]", "the same tokens"]),
    (call(k=(8, 2, 7)), ["k [8, 2, 7]", "one head_dim"]),
    (call(v=(8, 4, 5)), ["v [8, 4, 5]", "the same kv_heads"]),
    (call(q=(8, 3, 6)), ["3 heads must be a multiple of 2 kv_heads"]),
    (call(q=(0, 4, 6), k=(0, 2, 6), v=(0, 2, 5), cu_seqlens=(0, 0)), ["[0, 4, 6]", "at least 1"]),
    (call(q=None), ["q is NoneType", "a tensor [tokens, heads, dim]"]),
    (call(k=torch.zeros(8, 2, 6).double()), ["k is torch.float64, q is torch.float32"]),
    (call(pattern="Local(3)"), ["must be a Pattern"]),
    (call(scale=float("nan")), ["scale=nan", "finite"]),
    (call(backend="quantum"), ["backend='quantum'", "known backends are"]),
    (call(cu_seqlens=[0, 8]), ["cu_seqlens is list", "tensor [documents + 1]"]),
    (call(cu_seqlens=(0.0, 8.0)), ["cu_seqlens is torch.float32", "int32 or int64"]),
    (call(cu_seqlens=(0,)), ["cu_seqlens has shape [1]", "at least [2]"]),
    (call(cu_seqlens=((0, 8),)), ["cu_seqlens has shape [1, 2]"]),
    (call(cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")), ["cu_seqlens is on meta, q on cpu"]),
    (call(cu_seqlens=(1, 8)), ["cu_seqlens[0] is 1", "must be 0"]),
    (call(cu_seqlens=(0, 5, 3, 8)), ["cu_seqlens[2] is 3, below cu_seqlens[1], 5", "not decrease"]),
    (call(cu_seqlens=(0, 7)), ["cu_seqlens ends at 7", "must end at 8"]),
    (call(cu_seqlens=(0, 9)), ["cu_seqlens ends at 9", "must end at 8"]),
    (call(max_seqlen=4), ["max_seqlen=4", "the longest document has 5 tokens"]),
    (call(max_seqlen=4, backend="reference"), ["max_seqlen=4", "the longest document has 5 tokens"]),
    (call(max_seqlen=0), ["max_seqlen=0", "at least 1"]),
    (call(max_seqlen=5.0), ["max_seqlen=5.0", "a whole number"]),
    (call(max_seqlen=True), ["max_seqlen=True", "a whole number"]),
]


@pytest.mark.parametrize(("make", "words"), MISTAKES, ids=[" ".join(words) for _, words in MISTAKES])
def test_mistakes_are_named_with_their_remedy(make, words):
    with pytest.raises(ls.ArgumentError) as raised:
        make()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_is_too_small_is_named(backend):
    pattern = ls.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 2)
    with pytest.raises(ls.PatternError, match="covers 4 positions, not 5; give a larger table"):
        call(pattern=pattern, backend=backend)()
