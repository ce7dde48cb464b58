import math

import pytest
import torch

import longstride as ls
from longstride.attention import attention_stacked
from longstride.errors import ArgumentError
from longstride.nn import SelfAttention


def dense(layer: SelfAttention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The layer written out: softmax(q k^T / sqrt(head_dim)) v under a mask [T, T] or [H, T, T]."""
    heads, (qk, _, v_width) = layer.num_heads, layer.widths
    weight = layer.qkv_proj.weight
    outputs = []
    for head in range(heads):
        at, vat = qk // heads * head, v_width // heads * head
        w_q = weight[at : at + qk // heads]
        w_k = weight[qk + at : qk + at + qk // heads]
        w_v = weight[2 * qk + vat : 2 * qk + vat + v_width // heads]
        scores = (x @ w_q.T) @ (x @ w_k.T).transpose(1, 2) / math.sqrt(qk // heads)
        scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask[head]), -math.inf)
        outputs.append(scores.softmax(-1) @ (x @ w_v.T))
    return torch.cat(outputs, dim=-1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("text", ["Local(3)", "Local(4) | Strided(4)", "per_head(Local(3), Strided(4))", "Fixed(4, 1)"])
@pytest.mark.parametrize("qk_hidden_size", [None, 8])
@pytest.mark.parametrize("backend", [None, "reference", "torch"])
def test_layer_equals_dense_softmax_under_the_mask(text, qk_hidden_size, backend):
    torch.manual_seed(0)
    pattern = ls.parse(text)
    layer = SelfAttention(pattern, hidden_size=16, num_heads=4, qk_hidden_size=qk_hidden_size, backend=backend).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    out, expected = layer(x), dense(layer, x_dense, pattern.mask(11, heads=4))
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)


def test_half_size_queries_and_keys():
    layer = SelfAttention(ls.Local(4), hidden_size=32, num_heads=4, qk_hidden_size=16)
    assert layer.qkv_proj.weight.shape == (16 + 16 + 32, 32)
    assert layer.out_proj.weight.shape == (32, 32)
    assert layer(torch.randn(1, 7, 32)).shape == (1, 7, 32)
    assert [name for name, _ in layer.named_parameters()] == ["qkv_proj.weight", "out_proj.weight"]


@pytest.mark.parametrize(
    ("widths", "name"),
    [({"hidden_size": 10}, "hidden_size=10"), ({"hidden_size": 8, "qk_hidden_size": 6}, "qk_hidden_size=6")],
)
def test_heads_must_divide_the_widths(widths, name):
    with pytest.raises(ArgumentError, match=f"{name} is not divisible by num_heads=4: take a multiple of 4"):
        SelfAttention(ls.Local(4), num_heads=4, **widths)


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
def test_the_named_backend_is_asked_for(monkeypatch, backend):
    asked = []

    def spy(*arguments, **named):
        asked.append(named["backend"])
        return ls.attention(*arguments, **named)

    def stacked_spy(*arguments, **named):
        asked.append(named["backend"])
        return attention_stacked(*arguments, **named)

    monkeypatch.setattr("longstride.nn.self_attention.attention", spy)
    monkeypatch.setattr("longstride.nn.self_attention.attention_stacked", stacked_spy)
    layer = SelfAttention(ls.Local(4), hidden_size=8, num_heads=2, backend=backend)
    layer(torch.randn(1, 5, 8))
    with torch.no_grad():
        layer(torch.randn(1, 5, 8))
    assert asked == [backend, backend]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ArgumentError, match="backend='quantum': known backends are"):
        SelfAttention(ls.Local(4), hidden_size=8, num_heads=2, backend="quantum")


@pytest.mark.parametrize("text", ["Fixed(4, 1)", "per_head(Local(3), Strided(4))"])
def test_a_layer_with_a_cache_goes_on_where_it_was(text):
    torch.manual_seed(0)
    layer = SelfAttention(ls.parse(text), hidden_size=16, num_heads=4, qk_hidden_size=8).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    cache = ls.PatternCache(
        layer.pattern, capacity=20, batch=2, num_heads=4, head_dim=2, v_head_dim=4, dtype=torch.float64
    )
    outs = []
    with torch.no_grad():
        for part in x.split([9, 1, 1, 5, 4], dim=1):
            outs.append(layer(part, cache))
            cache.advance()
        torch.testing.assert_close(torch.cat(outs, 1), layer(x))
