import pytest
import torch

import longstride as ls
from longstride.nn import EncoderSelfAttention, GlobalProjections, global_tokens

PATTERN = ls.Local(4, lookahead=3) | ls.Global((2, 9), causal=False)


def test_which_tokens_are_global():
    assert global_tokens(PATTERN) == (2, 9)
    assert global_tokens(ls.Global(3, causal=False)) == (0, 1, 2)
    assert global_tokens(ls.per_head(ls.Local(2, lookahead=1), ls.Full()) | ls.Global(1, causal=False)) == (0,)


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Local(4, lookahead=3),
        ls.Local(4, lookahead=3) | ls.Global(1),
        ls.Global(1, causal=False) & ls.BlockLocal(4, causal=False),
    ],
    ids=str,
)
def test_a_pattern_without_global_tokens_is_refused(pattern):
    with pytest.raises(ls.PatternError, match="and this pattern names none; join one, as in"):
        GlobalProjections(pattern, hidden_size=8, num_heads=2)


@pytest.mark.parametrize("qk_hidden_size", [None, 4])
def test_rows_of_global_tokens_are_dense_attention_by_the_own_projections(qk_hidden_size):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "qk_hidden_size": qk_hidden_size}
    own = GlobalProjections(PATTERN, **sizes)
    layer = EncoderSelfAttention(PATTERN, global_projections=own, **sizes).double()
    shared = EncoderSelfAttention(PATTERN, **sizes).double()
    shared.load_state_dict(layer.state_dict(), strict=False)
    hidden = torch.randn(3, 12, 8, dtype=torch.float64)
    counts = torch.tensor([12, 9, 3])  # the second row has one global token, and the third, too
    out, expected = layer(hidden, counts), shared(hidden, counts)
    for row, count in enumerate(counts):
        real = hidden[row, :count]
        q, (k, v) = own.q_proj(real), own.kv_proj(real).split(own.widths, -1)
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (q, k, v))
        dense = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        wanted = expected[row, :count].clone()
        for token in (2, 9):
            if token < count:
                wanted[token] = layer.out_proj(dense[token])
        torch.testing.assert_close(out[row, :count], wanted, rtol=1e-12, atol=1e-12)


def test_a_sequence_shorter_than_its_global_tokens():
    layer = EncoderSelfAttention(
        PATTERN, hidden_size=8, num_heads=2, global_projections=GlobalProjections(PATTERN, hidden_size=8, num_heads=2)
    )
    assert layer(torch.randn(1, 2, 8)).isfinite().all()  # none of them is there
    layer(torch.randn(1, 5, 8)).sum().backward()
    assert layer.global_projections.q_proj.weight.grad.abs().sum() > 0
