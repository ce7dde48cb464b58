"""The one public op: layout, scale, log-sum-exp, transforms, `explain`, and errors."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from tests.oracle import assert_same, attend, make_inputs, results
from tests.strategies import Thirds, random_table
from torch.utils.checkpoint import checkpoint

import longstride as ls
from longstride.attention import forget

MERGED = ls.Local(4) | ls.Strided(4)
BACKENDS = ["torch", "reference"]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def gradients(pattern, inputs, backend=None, **options) -> tuple[torch.Tensor, ...]:
    out = ls.attention(*inputs, pattern, backend=backend, **options)
    return out, *torch.autograd.grad(out.sin().sum(), inputs)


def assert_all_close(got, wanted, tolerance: float = 1e-12) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_patterns_are_scaled_dot_product_attention(backend):
    inputs = make_inputs(2, 4, 2, 9, 9, 6, 3)
    out = ls.attention(*inputs, ls.Causal(), backend=backend)
    assert_all_close([out], [F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)])
    out = ls.attention(*inputs, ls.Full(), backend=backend, scale=0.1)
    assert_all_close([out], [F.scaled_dot_product_attention(*inputs, scale=0.1, enable_gqa=True)])


PATTERNS = [
    ls.Local(5),
    ls.Local(4, lookahead=3),
    ls.Strided(5),
    ls.Fixed(8, 2),
    ls.longformer(6, 2),
    ls.LogSparse(),
    ls.bigbird(4),
    MERGED,
    ls.per_head(ls.Local(5), ls.Strided(5)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_any_strides_give_the_numbers_of_contiguous_tensors(pattern):
    """[batch, length, heads, dim] transposed, every second number of a wider tensor, a slice, one number expanded."""
    heads, length = 4, 23
    wide = torch.randn(2, length, 3, heads, 10, dtype=torch.float64, requires_grad=True)
    transposed = [wide[:, :, n, :, :6].transpose(1, 2) for n in range(3)]
    gaps = [wide[:, :, n, :, ::2].transpose(1, 2) for n in range(3)]
    dim_first = [wide[:, :, n, :, :6].permute(0, 2, 3, 1).contiguous().transpose(2, 3) for n in range(3)]
    later = [wide[1:, 4:, n, :, 3:].transpose(1, 2) for n in range(3)]
    one_head = [wide[:, :, n, :1, :6].transpose(1, 2).expand(2, heads, length, 6) for n in range(3)]
    one_batch = [wide[:1, :, n, :, :6].transpose(1, 2).expand(2, heads, length, 6) for n in range(3)]
    one_row = [wide[:, :1, n, :, :6].transpose(1, 2).expand(2, heads, length, 6) for n in range(3)]
    one_number = [wide[:, :, n, :, :1].transpose(1, 2).expand(2, heads, length, 6) for n in range(3)]
    for views in (transposed, gaps, dim_first, later, one_head, one_batch, one_row, one_number):
        assert not views[0].is_contiguous()
        out, lse = ls.attention(*views, pattern, return_lse=True)
        copies = [x.contiguous() for x in views]
        wanted_out, wanted_lse = ls.attention(*copies, pattern, backend="reference", return_lse=True)
        assert_all_close((out, lse), (wanted_out, wanted_lse))
        got, wanted = (torch.autograd.grad(x.sin().sum(), wide, retain_graph=True) for x in (out, wanted_out))
        assert_all_close(got, wanted, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_of_any_strides_come_in(pattern):
    """out.transpose(1, 2) and out.sum() send back gradients that are transposed or expanded."""
    inputs = make_inputs(2, 4, 4, 23, 23)
    weights = torch.randn(2, 23, 4, 4, dtype=torch.float64)
    for finish in (lambda out: (out.transpose(1, 2) * weights).sum(), torch.sum, lambda out: out[:, 1::2, 3:].sum()):
        got, wanted = (
            torch.autograd.grad(finish(ls.attention(*inputs, pattern, backend=backend)), inputs) for backend in BACKENDS
        )
        assert_all_close(got, wanted, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("kv_heads", "q_len"), [(4, 23), (2, 23), (4, 7)])
def test_results_lie_in_memory_as_what_they_were_made_of(pattern, kv_heads, q_len):
    """Projections read them, and their gradients, without a copy; each of q, k and v may lie in its own way."""
    by_head = make_inputs(2, 4, kv_heads, q_len, 23, 6, 10)
    by_token = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in by_head]
    wanted = ls.attention(*by_head, pattern)
    for inputs in (by_head, by_token, (by_head[0], by_token[1], by_head[2]), (by_token[0], *by_head[1:])):
        out, lse = ls.attention(*inputs, pattern, return_lse=True)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        assert_all_close(grads, torch.autograd.grad(wanted.square().sum(), by_head, retain_graph=True), 1e-11)
        assert lse.is_contiguous()
        for result, like in zip((out, *grads), (inputs[0], *inputs), strict=True):
            assert (result if like.is_contiguous() else result.transpose(1, 2)).is_contiguous()


def test_the_inputs_are_left_alone():
    inputs = [x.detach() for x in make_inputs(2, 4, 2, 23, 30)]
    copies = [x.clone() for x in inputs]
    for pattern in PATTERNS:
        for x in inputs:
            x.requires_grad_()
        ls.attention(*inputs, pattern).sum().backward()
        for x, copy in zip(inputs, copies, strict=True):
            assert torch.equal(x, copy)


def test_query_heads_share_key_heads_in_neighbouring_groups():
    q, k, v = make_inputs(1, 6, 2, 12, 12)
    for pattern in (MERGED, ls.per_head(ls.Local(3), ls.Strided(3), ls.Fixed(4, 1)), ls.RandomBlocks(3, 2)):
        shared = gradients(pattern, (q, k, v))
        copies = [x.detach().repeat_interleave(3, 1).requires_grad_() for x in (k, v)]
        apart = gradients(pattern, (q, *copies))
        assert_all_close(shared[:2], apart[:2], 1e-11)
        assert_all_close(shared[2:], [x.unflatten(1, (2, 3)).sum(2) for x in apart[2:]], 1e-11)


def test_only_what_wants_gradients_gets_them():
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    whole = gradients(MERGED, (q, k, v))
    for place in range(3):
        inputs = [x if n == place else x.detach() for n, x in enumerate((q, k, v))]
        out = ls.attention(*inputs, MERGED)
        assert_all_close(torch.autograd.grad(out.sin().sum(), inputs[place]), [whole[place + 1]])
    assert not ls.attention(q.detach(), k.detach(), v.detach(), MERGED).requires_grad
    with torch.no_grad():
        assert not ls.attention(q, k, v, MERGED).requires_grad


def test_a_second_derivative_is_refused_not_wrong():
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    (grad,) = torch.autograd.grad(ls.attention(q, k, v, MERGED).sin().sum(), q, create_graph=True)
    with pytest.raises(ls.UnsupportedError, match="no second derivatives: pass backend='reference'"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own, of jvp
def test_forward_mode_is_refused_not_zero():
    q, k, v = (x.detach() for x in make_inputs(1, 2, 2, 12, 12))
    with pytest.raises(ls.UnsupportedError, match="no forward-mode derivatives: pass backend='reference'"):
        torch.func.jvp(lambda q: ls.attention(q, k, v, MERGED), (q,), (q,))
    _, tangent = torch.func.jvp(lambda q: ls.attention(q, k, v, MERGED, backend="reference"), (q,), (q,))
    assert tangent.abs().max() > 0


def test_the_backward_may_run_under_autocast():
    q, k, v = make_inputs(1, 2, 2, 40, 40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for pattern in (ls.Local(5), ls.Fixed(8, 2), ls.Global(3), ls.LogSparse()):
            ls.attention(q, k, v, pattern).float().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


# ---- scale and log-sum-exp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_one_over_the_root_of_the_head_dim(backend):
    q, k, v = make_inputs(1, 2, 2, 9, 9, 16, 4)
    usual = ls.attention(q, k, v, MERGED, backend=backend)
    assert_all_close([ls.attention(q, k, v, MERGED, scale=0.25, backend=backend)], [usual])
    assert_all_close([ls.attention(q * 2, k, v, MERGED, scale=0.125, backend=backend)], [usual])
    zero = ls.attention(q, k, v, MERGED, scale=0.0, backend=backend)
    assert_all_close([zero[:, :, 3]], [v[:, :, :4].mean(2)])


@dataclass(frozen=True, repr=False)
class OlderStrides(ls.Pattern):
    """What `Strided(8)` has beyond `Local(8)`."""

    def allows(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ((i - j) % 8 == 0) & (i - j >= 8)


TABLE = random_table(5, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (ls.Local(8), OlderStrides(), ls.Local(8) | ls.Strided(8)),
        (ls.BlockSparse(TABLE, 5), ls.BlockSparse(~TABLE, 5), ls.Full()),
        (ls.BlockSparse(TABLE, 5) & ls.Strided(2), ls.BlockSparse(~TABLE, 5) & ls.Strided(2), ls.Strided(2)),
    ],
    ids=str,
)
def test_callers_can_merge_by_the_log_sum_exp(one, other, both, backend):
    """Two disjoint attentions, merged outside by their log-sum-exps, are the attention of the union, gradients too."""
    inputs = make_inputs(2, 2, 1, 40, 40)

    def merged(q, k, v):
        (out_a, lse_a), (out_b, lse_b) = (
            ls.attention(q, k, v, pattern, backend=backend, return_lse=True) for pattern in (one, other)
        )
        lse = torch.logaddexp(lse_a, lse_b)
        weight_a, weight_b = ((part - lse).exp()[..., None] for part in (lse_a, lse_b))
        return weight_a * out_a + weight_b * out_b, lse

    assert_same(results(merged, inputs), results(attend(both, "reference"), inputs))


def test_the_log_sum_exp_alone_has_gradients():
    q, k, v = make_inputs(1, 2, 2, 20, 20)
    lses = [ls.attention(q, k, v, MERGED, backend=backend, return_lse=True)[1].sin().sum() for backend in BACKENDS]
    got, wanted = (torch.autograd.grad(lse, (q, k), retain_graph=True) for lse in lses)
    assert_all_close(got, wanted)
    (from_values,) = torch.autograd.grad(lses[0], v, allow_unused=True)
    assert from_values is None or not from_values.any()


def test_return_lse_changes_nothing_else():
    q, k, v = make_inputs(1, 2, 2, 20, 20)
    for backend in BACKENDS:
        out, lse = ls.attention(q, k, v, MERGED, backend=backend, return_lse=True)
        assert torch.equal(ls.attention(q, k, v, MERGED, backend=backend), out)
        assert lse.shape == (1, 2, 20)


# ---- transforms ---------------------------------------------------------------------------------------------------


COMPILED = [
    MERGED,
    ls.Fixed(8, 2),
    ls.LogSparse(),
    ls.longformer(6, 2),
    ls.per_head(ls.Local(5), ls.Strided(5)),
    Thirds(),
]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("pattern", COMPILED, ids=str)
@pytest.mark.parametrize("through_lse", [False, True])
def test_compiled_in_one_graph_it_is_the_same(pattern, through_lse, fresh_compiler):  # noqa: ARG001
    def step(q, k, v):
        out, lse = ls.attention(q * 2, k + 1, v, pattern, return_lse=True)
        return out.sin().sum() + (lse.cos().sum() if through_lse else 0.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    # Other lengths afterwards: the compiled function must not remember the first one.
    for length in (20, 33, 48):
        inputs = make_inputs(1, 2, 2, length, length)
        wanted, got = (torch.autograd.grad(f(*inputs), inputs) for f in (step, compiled))
        assert_all_close(got, wanted)


def test_compiled_code_may_make_its_patterns(fresh_compiler):  # noqa: ARG001
    def atom(q, k, v):
        return ls.attention(q, k, v, ls.Local(5))

    def union(q, k, v):
        return ls.attention(q, k, v, ls.Local(4) | ls.Strided(4))

    inputs = make_inputs(1, 2, 2, 20, 20)
    for function in (atom, union):
        assert_all_close([torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)], [function(*inputs)])


def test_a_compiled_function_takes_the_pattern_of_each_call(fresh_compiler):  # noqa: ARG001
    compiled = torch.compile(ls.attention, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(1, 4, 4, 20, 20)
    for pattern in (ls.Local(3), ls.Local(4), ls.per_head(ls.Local(4), ls.Strided(4)), ls.Local(3)):
        assert_all_close([compiled(*inputs, pattern)], [ls.attention(*inputs, pattern)])


@pytest.mark.skipif(shutil.which("c++") is None, reason="the inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # PyTorch's own, where it loads the inductor
@pytest.mark.slow
def test_the_inductor_compiles_it(fresh_compiler):  # noqa: ARG001
    def step(q, k, v):
        return ls.attention(q.sin(), k, v.cos(), MERGED).square().sum()

    by_head = [x.detach().float().requires_grad_() for x in make_inputs(1, 2, 2, 64, 64, 8)]
    by_token = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in by_head]
    # One process at a time: the compiler's pool costs more than this one function.
    with inductor.patch(compile_threads=1):
        compiled = torch.compile(step, fullgraph=True)
        for inputs in (by_head, by_token):
            wanted, got = (torch.autograd.grad(f(*inputs), inputs) for f in (step, compiled))
            assert_all_close(got, wanted, 1e-4)


@pytest.mark.parametrize("pattern", [ls.Local(3), ls.Fixed(4, 1), ls.per_head(ls.Local(4), ls.LogSparse())], ids=str)
def test_the_operator_is_registered_as_pytorch_asks(pattern):
    """Schema, autograd registration, fake tensors and the compiler's view of them."""
    by_head = make_inputs(1, 2, 2, 10, 12, 4, 6)
    by_token = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in by_head]
    ls.attention(*by_head, pattern)  # a pattern has its name in the operator once it was used
    for inputs in (make_inputs(1, 2, 1, 10, 12, 4, 6), by_token, (by_head[0], *by_token[1:])):
        checks = torch.library.opcheck(torch.ops.longstride.attention, (*inputs, str(pattern), 0.5, "torch"))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_again(reentrant):
    inputs = make_inputs(1, 2, 2, 30, 30)

    def block(q, k, v):
        return ls.attention(q * 2, k, v, MERGED).sin()

    got, wanted = (
        torch.autograd.grad(x.sum(), inputs) if not reentrant else _backward(x.sum(), inputs)
        for x in (checkpoint(block, *inputs, use_reentrant=reentrant), block(*inputs))
    )
    assert_all_close(got, wanted)


def _backward(loss, inputs) -> list[torch.Tensor]:
    """Reentrant checkpoints know `backward` alone."""
    for x in inputs:
        x.grad = None
    loss.backward()
    return [x.grad for x in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_float32_as_for_dense_attention(backend, dtype):
    inputs = [x.detach().float().requires_grad_() for x in make_inputs(1, 2, 2, 30, 30, 8)]
    lowered = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=dtype):
        out, lse = ls.attention(*inputs, MERGED, backend=backend, return_lse=True)
        assert out.dtype == F.scaled_dot_product_attention(*inputs).dtype == dtype
        mixed = ls.attention(lowered[0], *inputs[1:], MERGED, backend=backend)
        with torch.autocast("cpu", enabled=False):
            assert ls.attention(*inputs, MERGED, backend=backend).dtype == torch.float32
        assert ls.attention(*(x.double() for x in inputs), MERGED, backend=backend).dtype == torch.float64
    # Softmax and sums stay in float32, as without autocast.
    wanted, wanted_lse = ls.attention(*lowered, MERGED, backend=backend, return_lse=True)
    assert lse.dtype == torch.float32
    assert torch.equal(lse, wanted_lse)
    assert torch.equal(out, wanted)
    assert torch.equal(mixed, wanted)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert_all_close(grads, [grad.float() for grad in torch.autograd.grad(wanted.float().sum(), lowered)])


def test_shapes_alone_give_shapes():
    shapes = ((4, 9, 8), (2, 20, 8), (2, 20, 5))
    q, k, v = (torch.empty(2, *shape, device="meta") for shape in shapes)
    out, lse = ls.attention(q, k, v, MERGED, return_lse=True)
    assert out.shape == (2, 4, 9, 5)
    assert lse.shape == (2, 4, 9)
    assert out.device.type == "meta"


# ---- choosing and explaining --------------------------------------------------------------------------------------


def test_the_sparse_backend_is_chosen(monkeypatch):
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    monkeypatch.setattr("longstride.backends.reference.forward", lambda *_: pytest.fail("the reference was chosen"))
    for pattern in (MERGED, Thirds()):
        assert ls.attention(q, k, v, pattern).shape == q.shape
        assert ls.explain(q, k, v, pattern).backend == "torch"


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Choices are remembered by the kind of call: forget those of other tests, and those made here."""
    forget()
    yield
    forget()


@pytest.mark.usefixtures("no_memory")
def test_a_named_backend_runs_and_no_other(monkeypatch):
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    monkeypatch.setattr("longstride.backends.torch.forward", lambda *_: pytest.fail("the torch backend was chosen"))
    ls.attention(q, k, v, MERGED, backend="reference")
    monkeypatch.undo()
    monkeypatch.setattr("longstride.backends.torch.refusals", lambda _: ["it is broken today"])
    with pytest.raises(ls.UnsupportedError) as raised:
        ls.attention(q, k, v, MERGED, backend="torch")
    assert "it is broken today" in str(raised.value)
    assert "reference: takes it: pass backend='reference'" in str(raised.value)
    # And the reference is never taken unasked.
    with pytest.raises(ls.UnsupportedError, match="no backend takes the request"):
        ls.attention(q, k, v, MERGED)


@pytest.mark.usefixtures("no_memory")
def test_a_backend_that_prefers_a_request_goes_first(monkeypatch):
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    monkeypatch.setattr("longstride.backends.triton.refusals", lambda _: [])
    monkeypatch.setattr("longstride.backends.triton.describe", lambda _: "as fast as can be")
    assert ls.explain(q, k, v, MERGED).backend == "triton"
    monkeypatch.setattr("longstride.backends.torch.prefers", lambda _: "it is a leap year", raising=False)
    explanation = ls.explain(q, k, v, MERGED)
    assert explanation.backend == "torch"
    assert "backend torch: chosen (it is a leap year)" in str(explanation)
    assert explanation.reasons["triton"] == "torch comes first here"
    monkeypatch.setattr("longstride.backends.triton.forward", lambda *_: pytest.fail("triton was chosen"))
    ls.attention(q, k, v, MERGED)


@pytest.mark.usefixtures("no_memory")
def test_a_choice_is_made_once_for_each_kind_of_call(monkeypatch):
    asked = []
    monkeypatch.setattr("longstride.backends.triton.refusals", lambda request: asked.append(request) or ["not today"])
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    for _ in range(3):
        ls.attention(q, k, v, MERGED)
    assert len(asked) == 1
    ls.attention(q, k, v, MERGED, return_lse=True)
    ls.attention(q[:, :, 3:], k, v, MERGED)
    assert [(request.q_len, request.through_lse) for request in asked] == [(12, False), (12, True), (9, False)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain_prints_the_plan_and_every_backend(device, capsys):
    q, k, v = (torch.empty(1, 8, 4096, 64, device=device) for _ in range(3))
    explanation = ls.explain(q, k, v, ls.Local(64) | ls.Strided(64))
    text = str(explanation)
    assert capsys.readouterr().out == text + "\n"
    assert explanation.backend == "torch"
    assert set(explanation.reasons) == {"triton", "vendor", "flex", "reference"}
    pairs = 8 * (ls.Local(64) | ls.Strided(64)).pairs(4096)
    assert "Local(64) | Strided(64): 4,096 queries, 4,096 keys, 8 heads" in text
    assert f"{pairs:,} of {8 * 4096 * 4096:,} pairs allowed" in text
    for part in ls.plan(ls.Local(64) | ls.Strided(64), 4096).parts:
        assert f"{part}: {part.pairs(4096):,} pairs" in text
    assert f"{ls.plan(ls.Local(64) | ls.Strided(64), 4096, 4096, 8).scored_pairs:,} pairs scored" in text
    assert "backend torch: chosen" in text
    assert "backend reference: not chosen: only used when named" in text


def test_explain_of_a_million_positions_computes_nothing():
    q = torch.empty(1, 8, 2**20, 64, device="meta")
    text = str(ls.explain(q, q, q, ls.per_head(ls.Local(1024), ls.Strided(1024))))
    assert "heads 0-3:" in text
    assert "heads 4-7:" in text
    assert f"{4 * (ls.Local(1024).pairs(2**20) + ls.Strided(1024).pairs(2**20)):,} of" in text


def test_explain_says_what_a_rule_of_ones_own_costs():
    q = torch.empty(1, 2, 100, 8)
    text = str(ls.explain(q, q, q, Thirds(7) | ls.Local(3)))
    assert "the rule of Thirds(shared=7) is the user's own" in text
    assert "evaluated on all 10,000 pairs" in text


def test_explain_gives_the_reasons_against():
    q = torch.zeros(1, 2, 10, 8)
    named = ls.explain(q, q, q, MERGED, backend="reference", scale=0.1, return_lse=True)
    assert named.backend == "reference"
    assert "backend reference: chosen (it was asked for)" in str(named)
    assert "'reference' was asked for" in named.reasons["torch"]
    nobody = ls.explain(*(x.long() for x in (q, q, q)), MERGED)
    assert nobody.backend is None
    assert "torch.int64" in nobody.reasons["torch"]
    assert "torch.int64" in nobody.reasons["reference"]


# ---- errors -------------------------------------------------------------------------------------------------------


def call(q=(1, 4, 8, 6), k=(1, 2, 8, 6), v=(1, 2, 8, 5), pattern=MERGED, dtype=torch.float32, **options):
    """A call of both `attention` and `explain`, which check alike."""
    tensors = [torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x for x in (q, k, v)]
    return lambda f: f(*tensors, pattern, **options)


MISTAKES = [
    (call(q=(4, 8, 6)), ["q has shape [4, 8, 6]", "4 dims, [batch, heads, length, dim]"]),
    (call(v=(1, 1, 2, 8, 5)), ["v has shape [1, 1, 2, 8, 5]", "4 dims"]),
    (call(q=(2, 4, 8, 6)), ["q [2, 4, 8, 6]", "k [1, 2, 8, 6]", "one batch size"]),
    (call(v=(2, 2, 8, 5)), ["v [2, 2, 8, 5]", "one batch size"]),
    (call(k=(1, 2, 8, 7)), ["k [1, 2, 8, 7]", "one head_dim"]),
    (call(v=(1, 2, 9, 5)), ["v [1, 2, 9, 5]", "same kv_heads and kv_len"]),
    (call(v=(1, 4, 8, 5)), ["v [1, 4, 8, 5]", "same kv_heads and kv_len"]),
    (call(q=(1, 3, 8, 6)), ["3 heads must be a multiple of 2 kv_heads"]),
    (call(k=(1, 8, 8, 6), v=(1, 8, 8, 5)), ["4 heads must be a multiple of 8 kv_heads"]),
    (call(q=(1, 4, 9, 6)), ["q [1, 4, 9, 6]", "q_len must be at most kv_len"]),
    (call(q=(1, 4, 0, 6)), ["q has shape [1, 4, 0, 6]", "at least 1"]),
    (call(k=(1, 2, 8, 0), q=(1, 4, 8, 0)), ["[1, 4, 8, 0]", "at least 1"]),
    (call(k=torch.zeros(1, 2, 8, 6, dtype=torch.float64)), ["k is torch.float64, q is torch.float32", "convert"]),
    (call(v=torch.zeros(1, 2, 8, 5, dtype=torch.bfloat16)), ["v is torch.bfloat16, q is torch.float32", "one dtype"]),
    (call(k=torch.zeros(1, 2, 8, 6, device="meta")), ["k is on meta, q on cpu", "one device", "move"]),
    (call(q=None), ["q is NoneType", "must be a tensor"]),
    (call(v=[[1.0]]), ["v is list", "must be a tensor"]),
    (call(pattern="Local(3)"), ["'Local(3)'", "must be a Pattern", "longstride.parse(text)"]),
    (call(pattern=None), ["None", "must be a Pattern"]),
    (call(pattern=ls.gpt3(3)), ["must be a Pattern"]),
    (call(scale=float("nan")), ["scale=nan", "finite"]),
    (call(scale=float("inf")), ["scale=inf", "finite"]),
    (call(scale="a"), ["scale='a'", "number"]),
    (call(backend="trition"), ["backend='trition'", "'torch', 'flex', 'vendor', 'reference'"]),
    (call(backend=""), ["backend=''", "'torch', 'flex', 'vendor', 'reference'"]),
    (call(backend=3), ["backend=3", "'torch', 'flex', 'vendor', 'reference'"]),
]


@pytest.mark.parametrize("function", [ls.attention, ls.explain])
@pytest.mark.parametrize(("make", "words"), MISTAKES, ids=[" ".join(words) for _, words in MISTAKES])
def test_mistakes_are_named_with_their_remedy(function, make, words):
    with pytest.raises(ls.ArgumentError) as raised:
        make(function)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_nobody_takes_lists_every_backend(backend, dtype):
    with pytest.raises(ls.UnsupportedError) as raised:
        call(dtype=dtype, backend=backend)(ls.attention)
    message = str(raised.value)
    for word in (str(dtype), "torch: ", "reference: ", "float32" if backend is None else repr(backend)):
        assert word in message


@pytest.mark.parametrize("function", [ls.attention, ls.explain])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_heads_that_a_pattern_does_not_divide_are_named(function, backend):
    three = ls.per_head(ls.Local(3), ls.Strided(3), ls.Full())
    with pytest.raises(ls.PatternError, match=r"per_head\(.*\): 4 heads do not divide into 3 equal groups; use"):
        call(pattern=three, backend=backend)(function)
    layouts = ls.BlockSparse(random_table(0, 4, 3), 4)
    with pytest.raises(ls.PatternError, match="4 heads do not divide into 3 equal groups"):
        call(pattern=layouts, backend=backend)(function)


@pytest.mark.parametrize("function", [ls.attention, ls.explain])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_table_that_is_too_small_is_named(function, backend):
    pattern = ls.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 3)
    with pytest.raises(ls.PatternError, match="covers 6 positions, not 8; give a larger table"):
        call(pattern=pattern, backend=backend)(function)


def test_every_error_is_a_longstride_error_and_a_value_error():
    for error in (ls.PatternError, ls.ArgumentError, ls.UnsupportedError):
        assert issubclass(error, ls.LongstrideError)
        assert issubclass(error, ValueError)
