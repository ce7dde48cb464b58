"""Past the operator in ordinary eager code, through it wherever something watches; the same numbers either way."""

from contextlib import nullcontext

import pytest
import torch
from tests.oracle import make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import longstride as ls
from longstride.dispatch import checks, custom_ops

MERGED = ls.Local(4) | ls.Strided(4)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def batched(q, k, v, **options):
    return ls.attention(q, k, v, MERGED, **options)


def packed(q, k, v, **options):
    """The batch's rows as documents."""
    lengths, total = q.shape[2], q.shape[0] * q.shape[2]
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    documents = torch.arange(0, total + 1, lengths, dtype=torch.int32, device="cpu")
    return ls.attention_varlen(*tokens, documents, MERGED, max_seqlen=lengths, **options)


@pytest.fixture(params=[batched, packed], ids=["batched", "packed"])
def attend(request):
    return request.param


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """The operators that are called from here on, in order."""
    called = []

    def spy(name, operator):
        return lambda *some: called.append(name) or operator(*some)

    for name in ("_batched", "_batched_backward", "_packed", "_packed_backward"):
        monkeypatch.setattr(
            custom_ops, name, spy("backward" if "backward" in name else "forward", vars(custom_ops)[name])
        )
    return called


def gradients(attend, inputs):
    return torch.autograd.grad(attend(*inputs).sin().sum(), inputs)


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_ordinary_calls_leave_the_operator_out(attend, operators):
    inputs = make_inputs(2, 4, 2, 20, 20)
    parameters = [torch.nn.Parameter(x.detach()) for x in inputs]
    for some in (inputs, parameters, [x * 1 for x in inputs]):
        gradients(attend, some)
    attend(*(x.detach() for x in inputs))
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            attend(*inputs)
            attend(*(x.clone() for x in inputs))
    lowered = [x.detach().float().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        attend(*lowered).float().sum().backward()
    assert operators == []


def test_both_doors_give_the_same_numbers(attend, operators, monkeypatch):
    inputs = make_inputs(2, 4, 2, 20, 20)
    for finish in (
        lambda out, lse: out.sin().sum() + lse.cos().sum(),
        lambda _, lse: lse.sum(),
        lambda out, _: out.sum(),
    ):
        loss = finish(*attend(*inputs, return_lse=True))
        got = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert operators == []
        with monkeypatch.context() as patch:
            patch.setattr(checks, "_jit_trace", lambda: True)
            wanted_loss = finish(*attend(*inputs, return_lse=True))
            wanted = torch.autograd.grad(wanted_loss, inputs, allow_unused=True)
        assert operators == ["forward", "backward"]
        operators.clear()
        assert torch.equal(loss, wanted_loss)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("lost", ["_dispatch_modes", "_function_modes", "_transforms", "_jit_trace", "_keys"])
def test_a_pytorch_without_one_of_its_names_takes_the_operator(attend, operators, monkeypatch, lost):
    monkeypatch.setattr(checks, lost, None if lost == "_keys" else lambda: True)
    inputs = make_inputs(1, 2, 2, 12, 12)
    gradients(attend, inputs)
    assert operators == ["forward", "backward"]


# ---- who watches --------------------------------------------------------------------------------------------------


def test_modes_see_the_operator(attend, operators):
    inputs = make_inputs(1, 2, 2, 12, 12)
    wanted = gradients(attend, inputs)
    for forward, backward, seen in (
        (counter, counter, ["forward", "backward"]),
        (counter, nullcontext, ["forward", "backward"]),
        (nullcontext, counter, ["backward"]),
    ):
        operators.clear()
        with forward():
            loss = attend(*inputs).sin().sum()
        with backward():
            assert_equal(torch.autograd.grad(loss, inputs), wanted)
        assert operators == seen


def counter():
    return FlopCounterMode(display=False)


def test_a_default_device_is_not_for_what_a_backend_makes(attend, operators):
    inputs = make_inputs(1, 2, 2, 12, 12)
    wanted = attend(*inputs)
    with torch.device("meta"):
        assert torch.equal(attend(*inputs), wanted)
    assert operators == ["forward"]


def test_fake_tensors_see_the_operator(operators):
    with FakeTensorMode():
        out = batched(*(torch.empty(1, 2, 12, 8) for _ in range(3)))
        tokens, documents = torch.empty(12, 2, 8), torch.empty(2, dtype=torch.int32)
        out_packed = ls.attention_varlen(tokens, tokens, tokens, documents, MERGED, max_seqlen=12)
    assert out.shape == (1, 2, 12, 8)
    assert out_packed.shape == (12, 2, 8)
    assert operators == ["forward", "forward"]


def test_traces_have_the_operator():
    inputs = [x.detach() for x in make_inputs(1, 2, 2, 12, 12)]
    targets = [
        node.target
        for node in make_fx(lambda q, k, v: batched(q, k, v))(*inputs).graph.nodes
        if node.op == "call_function"
    ]
    assert torch.ops.longstride.attention.default in targets


def test_selective_checkpoints_see_the_operator(attend, operators):
    asked = []

    def policy(_context, operator, *_args, **_options):
        ours = operator.namespace == "longstride"
        asked.extend([str(operator)] if ours else [])
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*some):
        options = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(policy)}
        return checkpoint(lambda *x: attend(*x).sin(), *some, **options)

    inputs = make_inputs(1, 2, 2, 12, 12)
    assert_equal(torch.autograd.grad(block(*inputs).sum(), inputs), gradients(attend, inputs))
    assert asked
    assert operators[-1] == "backward"


def test_batches_of_gradients_see_the_operator(attend, operators):
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    out = attend(q, k, v)
    seeds = torch.randn(3, *out.shape, dtype=out.dtype)
    (got,) = torch.autograd.grad(out, q, seeds, is_grads_batched=True, retain_graph=True)
    assert operators == ["backward"]
    assert_equal(got, [torch.autograd.grad(out, q, seed, retain_graph=True)[0] for seed in seeds])


def test_vmap_sees_the_operator(attend, operators):
    q, k, v = (x.detach() for x in make_inputs(1, 2, 2, 12, 12))
    more = torch.stack([q, q * 2])
    got = torch.vmap(lambda q: attend(q, k, v))(more)
    assert "forward" in operators
    assert_equal(got, [attend(q, k, v) for q in more])


class Own(torch.Tensor):
    """A tensor of the user's own."""


def test_subclasses_see_the_operator(operators):
    q, k, v = (x.detach() for x in make_inputs(1, 2, 2, 12, 12))
    out = batched(q.as_subclass(Own), k, v)
    assert operators == ["forward"]
    assert isinstance(out, Own)


def test_data_that_lie_are_put_right(operators):
    """A lazy negation, in an input and in a gradient: kernels read memory as it is."""
    q, k, v = make_inputs(1, 2, 2, 12, 12)
    lazy = torch.view_as_complex(torch.randn(1, 2, 12, 4, 2, dtype=torch.float64)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(batched(lazy, k, v), batched(lazy.resolve_neg(), k, v))
    assert operators == ["forward"]
    out = batched(q, k, v)
    got, wanted = (torch.autograd.grad(out, (q, k, v), x, retain_graph=True) for x in (lazy, lazy.resolve_neg()))
    assert_equal(got, wanted)
    assert operators == ["forward", "backward"]


# ---- what is kept for the backward --------------------------------------------------------------------------------


def test_a_change_of_what_is_kept_is_noticed():
    for place in range(3):
        inputs = [x * 1 for x in make_inputs(1, 2, 2, 12, 12)]
        loss = batched(*inputs).sum()
        inputs[place].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_see_what_is_kept(attend, operators):
    inputs = make_inputs(1, 2, 2, 12, 12)
    wanted = gradients(attend, inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x.clone(), lambda x: x):
        out = attend(*inputs)
    assert len(kept) == (5 if attend is batched else 6)
    assert_equal(torch.autograd.grad(out.sin().sum(), inputs), wanted)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(gradients(attend, inputs), wanted)
    assert operators == []


def test_hooks_on_tensors_run(attend):
    inputs = make_inputs(1, 2, 2, 12, 12)
    seen = []
    for x in inputs:
        x.register_hook(lambda grad: seen.append(grad.shape))
    out = attend(*inputs)
    out.register_hook(lambda grad: grad * 2)
    twice = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert len(seen) == 3
    assert_equal(twice, [2 * x for x in torch.autograd.grad(attend(*inputs).sum(), inputs)])


def test_a_graph_that_is_freed_says_so(attend):
    loss = attend(*make_inputs(1, 2, 2, 12, 12)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


# ---- autocast -----------------------------------------------------------------------------------------------------


def test_autocast_is_as_it_was_after_a_call(attend):
    inputs = [x.detach().float() for x in make_inputs(1, 2, 2, 12, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        attend(*inputs)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(ls.ArgumentError):
            attend(*inputs, scale=float("nan"))
        assert torch.is_autocast_enabled("cpu")
        assert (inputs[0] @ inputs[0].mT).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
