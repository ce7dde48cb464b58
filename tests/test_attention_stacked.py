"""Attention of q, k and v that lie side by side: the numbers of `attention`, and a single gradient."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longstride as ls
from longstride.attention import BACKENDS, attention_stacked
from longstride.backends.layout import heads_of
from longstride.dispatch import checks, custom_ops

MERGED = ls.Local(4) | ls.Strided(4)
HEADS, QK_WIDTH, V_WIDTH = 4, 32, 64


@pytest.fixture
def together() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 30, 2 * QK_WIDTH + V_WIDTH, dtype=torch.float64, requires_grad=True)


def attend(together, pattern=MERGED, heads=HEADS, qk_width=QK_WIDTH, **options):
    return attention_stacked(together, pattern, heads=heads, qk_width=qk_width, **options)


def apart(together, pattern=MERGED, heads=HEADS, qk_width=QK_WIDTH, **options):
    return ls.attention(*heads_of(together, heads, qk_width), pattern, **options)


def gradient(run, together):
    return torch.autograd.grad(run(together).sin().sum(), together)[0]


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    called = []

    def spy(name, operator):
        return lambda *some: called.append(name) or operator(*some)

    for name in ("_stacked", "_stacked_backward"):
        monkeypatch.setattr(custom_ops, name, spy(name, vars(custom_ops)[name]))
    return called


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("pattern", [MERGED, ls.Fixed(4, 1), ls.per_head(*[ls.Local(3), ls.Causal()] * 2)], ids=str)
def test_it_is_attention(together, pattern, backend):
    ours, theirs = (partial(f, pattern=pattern, backend=backend) for f in (attend, apart))
    torch.testing.assert_close(ours(together), theirs(together), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(ours, together), gradient(theirs, together), rtol=0, atol=1e-12)


def test_the_backend_writes_into_the_one_gradient(together, operators, monkeypatch):
    given = []
    backward = BACKENDS["torch"].backward

    def spy(*some):
        given.append(some[-1])
        return backward(*some)

    monkeypatch.setattr(BACKENDS["torch"], "backward", spy)
    got = gradient(attend, together)
    ((grad_q, grad_k, grad_v),) = given
    assert got.is_contiguous()
    for grad, wanted in zip((grad_q, grad_k, grad_v), heads_of(got, HEADS, QK_WIDTH), strict=True):
        assert torch.equal(grad, wanted)
        assert grad.untyped_storage().data_ptr() == grad_q.untyped_storage().data_ptr()
    assert operators == []


def test_memory_that_kernels_would_not_take_is_copied(monkeypatch):
    """Widths after which a float32 tensor no longer begins at a multiple of 16 bytes."""
    given = []
    backward = BACKENDS["torch"].backward
    monkeypatch.setattr(BACKENDS["torch"], "backward", lambda *some: given.append(some[-1]) or backward(*some))
    together = torch.randn(1, 20, 2 * 6 + 6, requires_grad=True)
    ours, theirs = (partial(f, heads=2, qk_width=6) for f in (attend, apart))
    torch.testing.assert_close(gradient(ours, together), gradient(theirs, together))
    assert given[0] is None


def test_both_doors_give_the_same_numbers(together, operators, monkeypatch):
    got = gradient(attend, together)
    assert operators == []
    monkeypatch.setattr(checks, "_jit_trace", lambda: True)
    assert torch.equal(gradient(attend, together), got)
    assert operators == ["_stacked", "_stacked_backward"]


def test_without_gradients_nothing_is_kept(together, operators):
    with torch.no_grad():
        out = attend(together)
    assert not out.requires_grad
    assert not attend(together.detach()).requires_grad
    assert torch.equal(out, apart(together))
    assert operators == []


def test_second_derivatives_are_refused(together):
    (first,) = torch.autograd.grad(attend(together).sum(), together, create_graph=True)
    with pytest.raises((ls.UnsupportedError, RuntimeError)):
        torch.autograd.grad(first.sum(), together)


def test_autocast(together):
    together = together.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(together)
        assert torch.is_autocast_enabled("cpu")
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert together.grad is not None
    assert together.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_operator_is_registered_as_pytorch_asks(together):
    attend(together)  # a pattern has its name in the operator once it was used
    operator = torch.ops.longstride.attention_stacked
    checks = torch.library.opcheck(operator, (together, HEADS, QK_WIDTH, str(MERGED), 0.5, "torch"))
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_there_is_no_copy(together):
    """The backward graph has no concatenation; that of three tensors has."""
    # Not at the top: they import Triton, which the tests of its kernels set up before.
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found: dict[str, set[str]] = {}

    def backend(name):
        def keep(graph, _inputs):
            found.setdefault(name, set()).update(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=keep)

    wanted = gradient(attend, together)
    for run in (attend, apart):
        torch.compiler.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend(run.__name__))
        torch.testing.assert_close(gradient(compiled, together), wanted)
    torch.compiler.reset()
    assert "longstride.attention_stacked_backward.default" in found["attend"]
    assert not any("cat" in target for target in found["attend"])
    assert any("cat" in target for target in found["apart"])


def test_selective_checkpoints_keep_its_results(together, operators):
    kept = [torch.ops.longstride.attention_stacked.default]
    options = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, kept)}
    ran = []
    forward = BACKENDS["torch"].forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS["torch"], "forward", lambda *some: ran.append(1) or forward(*some))
        got = gradient(lambda x: checkpoint(lambda y: attend(y * 1).sin(), x, **options), together)
    assert len(ran) == 1
    torch.testing.assert_close(got, gradient(lambda x: attend(x).sin(), together))
    assert operators.count("_stacked_backward") <= 1


@pytest.mark.parametrize(
    ("shape", "heads", "qk_width"),
    [((2, 30), 4, 32), ((2, 30, 60), 4, 32), ((2, 30, 64), 4, 32), ((2, 30, 130), 4, 32), ((2, 30, 96), 0, 32)],
)
def test_what_does_not_fit_is_refused(shape, heads, qk_width):
    words = rf"with heads={heads} and qk_width={qk_width}: it must be \[batch, length"
    with pytest.raises(ls.ArgumentError, match=words):
        attend(torch.zeros(shape), heads=heads, qk_width=qk_width)
    with pytest.raises(ls.ArgumentError, match="stacked is list: it must be a tensor"):
        attend([0.0])


def test_other_checks_are_those_of_attention(together):
    with pytest.raises(ls.ArgumentError, match="quantum"):
        attend(together, backend="quantum")
