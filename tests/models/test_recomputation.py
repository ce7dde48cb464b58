"""Recomputation: the same gradients, from what the policy says is kept."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.backends import torch as torch_backend
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models import RECOMPUTE, recompute_in_backward


def gradients(model, tokens):
    model.zero_grad()
    torch.manual_seed(3)
    model(tokens, labels=tokens).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("block", ["sparse_transformer", "modern"])
@pytest.mark.parametrize("patterns", [["Local(4)", "Strided(4)"], "Fixed(4, 1)"], ids=str)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradients_are_equal(make_model, tokens, block, patterns, backend):
    model = make_model(block=block, patterns=patterns, attention_backend=backend, dropout=0.2).train()
    plain = gradients(model, tokens)
    for what in RECOMPUTE:
        recompute_in_backward(model, what)
        for ours, theirs in zip(gradients(model, tokens), plain, strict=True):
            assert torch.equal(ours, theirs), what


@pytest.mark.parametrize("mask", [False, True])
def test_gradients_of_padded_rows_under_autocast(make_model, tokens, mask):
    model = make_model(dtype=torch.float32).train()
    options = {}
    if mask:
        options["attention_mask"] = torch.ones_like(tokens)
        options["attention_mask"][0, :6] = 0
    found = []
    for what in RECOMPUTE:
        recompute_in_backward(model, what)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, labels=tokens, **options).loss
        loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("what", "forwards", "maps"), [("nothing", 3, 3), ("blocks", 6, 6), ("all_but_attention", 3, 6)]
)
def test_what_is_computed_twice(make_model, tokens, monkeypatch, what, forwards, maps):
    model = make_model().train()
    recompute_in_backward(model, what)
    counts = Counter()
    forward = torch_backend.forward

    def counted(*arguments):
        counts["attention"] += 1
        return forward(*arguments)

    monkeypatch.setattr(torch_backend, "forward", counted)
    for layer in model.model.layers:
        layer.attention.qkv_proj.register_forward_hook(lambda *_: counts.update(["maps"]))
    model(tokens, labels=tokens).loss.backward()
    assert (counts["attention"], counts["maps"]) == (forwards, maps)


class Kept(TorchDispatchMode):
    """Bytes of the storages that operators made, the model's own left out, and that are alive."""

    def __init__(self, model):
        super().__init__()
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.storages[storage._weak_ref()] = storage.nbytes()
        return out

    @property
    def nbytes(self):
        return sum(size for ref, size in self.storages.items() if not torch.UntypedStorage._expired(ref))


def test_memory_between_forward_and_backward(make_model):
    """Per token and block, in float64: the input, 16 numbers; with the attention's output and log-sum-exp, 34."""
    tokens = torch.zeros(1, 48, dtype=torch.long)
    kept = {}
    for what in RECOMPUTE:
        for layers in (2, 6):
            model = make_model(num_hidden_layers=layers, attention_backend="torch").train()
            recompute_in_backward(model, what)
            with Kept(model) as memory:
                loss = model(tokens, labels=tokens).loss
            kept[what, layers] = memory.nbytes
            del loss
    numbers = {what: (kept[what, 6] - kept[what, 2]) / 4 / 48 / 8 for what in RECOMPUTE}
    assert numbers["blocks"] == 16
    assert numbers["all_but_attention"] == 34
    assert numbers["nothing"] > 150


@pytest.mark.slow
@pytest.mark.parametrize("what", RECOMPUTE)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(make_model, tokens, what):
    model = make_model(dtype=torch.float32).train()
    plain = gradients(model, tokens)
    recompute_in_backward(model, what)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss.backward()
    for parameter, theirs in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


def test_refusals(make_model):
    with pytest.raises(ArgumentError, match="recompute='everything': it must be one of 'nothing', 'blocks'"):
        recompute_in_backward(make_model(), "everything")
    with pytest.raises(UnsupportedError, match="backend='reference': autograd differentiates that backend"):
        recompute_in_backward(make_model(attention_backend="reference"), "all_but_attention")
