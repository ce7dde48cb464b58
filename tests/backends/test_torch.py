"""The sparse backend against the reference, in float64: out, log-sum-exp and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import assert_torch_is_reference, make_inputs
from tests.strategies import ATOMS, lengths, patterns, random_table

import longstride as ls
from longstride.plan import KINDS

SCALES = st.sampled_from([None, None, 0.0, 0.3, -0.5])


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (37, 37), (64, 64), (1, 33), (7, 40), (23, 50)])
def test_an_atom_is_computed_exactly(pattern, size):
    assert_torch_is_reference(pattern, *size, batch=2)
    assert_torch_is_reference(pattern, *size, kv_heads=2, v_dim=7, through_lse=False)


@pytest.mark.parametrize("left", ATOMS, ids=str)
def test_two_atoms_are_computed_exactly(left):
    for right in ATOMS:
        for pattern in (left | right, left & right):
            assert_torch_is_reference(pattern, 19, 40, heads=2, kv_heads=1)


@settings(max_examples=200)
@given(
    pattern=patterns(),
    size=lengths(),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    dims=st.sampled_from([(4, 4), (3, 5), (8, 2), (1, 1)]),
    scale=SCALES,
    through_lse=st.booleans(),
)
def test_any_request_is_computed_exactly(pattern, size, batch, kv_heads, dims, scale, through_lse):
    assert_torch_is_reference(
        pattern,
        *size,
        batch=batch,
        heads=4,
        kv_heads=kv_heads,
        dim=dims[0],
        v_dim=dims[1],
        scale=scale,
        through_lse=through_lse,
    )


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Causal(),
        ls.Local(70),
        ls.Local(65, lookahead=64),
        ls.Local(300),
        ls.Dilated(30, 3),
        ls.Strided(16),
        ls.Fixed(64, 4),
        ls.Summary(32, 4) | ls.Local(50),
        ls.Fixed(16, 6) | ls.Strided(16),
        ls.bigbird(16),
        ls.longformer(64, (0, 300, 650)),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(300, 300), (700, 1000), (1, 900)])
def test_lengths_of_many_tiles_too(pattern, size):
    assert_torch_is_reference(pattern, *size, heads=2, kv_heads=1, dim=8)


@pytest.mark.parametrize(
    "pattern",
    [ls.Local(40), ls.Dilated(20, 3, lookahead=9), ls.bigbird(16), ls.Fixed(32, 4), ls.Global(40)],
    ids=str,
)
def test_slabs_do_not_show(pattern, monkeypatch):
    """Slabs of a few tiles, and of a part of the sequences, give the numbers of one slab."""
    inputs = make_inputs(3, 2, 2, 130, 200)
    whole = ls.attention(*inputs, pattern, backend="torch")
    grads = torch.autograd.grad(whole.sin().sum(), inputs)
    for module in ("masked", "window"):
        monkeypatch.setattr(f"longstride.backends.torch.{module}.slab_scores", lambda _: 5000)
    out = ls.attention(*inputs, pattern, backend="torch")
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


GRADCHECKED = [
    ("Rows Columns", ls.Global(2, causal=False), (9, 9)),
    ("Rows Band Columns", ls.Global((1, 6)) | ls.Local(1), (9, 9)),
    ("Band", ls.Local(4), (9, 9)),
    ("Band", ls.Local(3, lookahead=2), (9, 11)),
    ("Band", ls.Strided(3), (9, 9)),
    ("Band", ls.Strided(3, causal=False), (5, 9)),
    ("Band", ls.Causal(), (5, 9)),
    ("Chunk", ls.BlockLocal(4), (9, 9)),
    ("Chunk", ls.BlockLocal(4, causal=False), (6, 9)),
    ("Columns", ls.Summary(3, 1), (6, 9)),
    ("Chunk Columns", ls.Fixed(3, 1), (9, 9)),
    ("Offsets", ls.LogSparse(3), (20, 20)),
    ("Table Table", ls.RandomBlocks(2, 2), (9, 9)),
    ("Table", ls.BlockSparse(torch.eye(3, dtype=torch.bool) | random_table(1, 3, length=9), 3), (9, 9)),
    ("Rows Band Columns", ls.longformer(4, 1), (9, 9)),
    ("Band Band", ls.Local(3) | ls.Strided(3), (9, 9)),
    ("Band Band", ls.per_head(ls.Local(3), ls.Strided(3)), (9, 9)),
]


@pytest.mark.parametrize(("kinds", "pattern", "size"), GRADCHECKED, ids=str)
def test_gradients_are_finite_differences(kinds, pattern, size):
    """`gradcheck` through out and the log-sum-exp, for every kind of part."""
    assert [part.kind for part in ls.plan(pattern, *size, 2).parts] == kinds.split()
    inputs = make_inputs(1, 2, 1, *size, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *x: ls.attention(*x, pattern, backend="torch", return_lse=True, scale=0.8), inputs
    )


def test_every_kind_of_part_is_gradchecked():
    assert {kind for kinds, _, _ in GRADCHECKED for kind in kinds.split()} == set(KINDS)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "pattern",
    [
        ls.Summary(6, 2),
        ls.Global((9, 20)),
        ls.Strided(4) & ls.Summary(6, 2),
        ls.Global((90,)),
        ls.LogSparse(3) & ls.Summary(6, 1),
        ls.BlockSparse(torch.ones(8, 8, dtype=torch.bool).tril(-1), 5),
        ls.BlockLocal(6) & ls.Summary(6, 1),
        ls.per_head(ls.Summary(6, 2), ls.Local(3)),
    ],
    ids=str,
)
def test_queries_without_keys_are_zero_everywhere(pattern, backend):
    """Output 0, log-sum-exp -inf, no gradient in or out, no NaN; the other queries are as without them."""
    q, k, v = make_inputs(2, 2, 2, 30, 30, 4, 6)
    empty = ~pattern.mask(30, heads=2).any(-1).expand(2, 2, 30)
    assert empty.any()
    out, lse = ls.attention(q, k, v, pattern, backend=backend, return_lse=True)
    assert not out[empty].any()
    assert (lse[empty] == -torch.inf).all()
    assert lse[~empty].isfinite().all()
    # Gradients that flow into those rows end there, whatever they are.
    into_out, into_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (into_out, into_lse))
    assert not grads[0][empty].any()
    quiet = (into_out * ~empty[..., None], into_lse * ~empty)
    out, lse = ls.attention(q, k, v, pattern, backend=backend, return_lse=True)
    for a, b in zip(grads, torch.autograd.grad((out, lse), (q, k, v), quiet), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@settings(max_examples=60)
@given(patterns(), st.integers(2, 40), st.integers(1, 8))
def test_decoding_gives_the_last_rows_of_the_full_run(pattern, length, fed):
    """One new query, or a few, against all keys."""
    q, k, v = (x.detach() for x in make_inputs(1, 4, 2, length, length))
    fed = min(fed, length)
    out, lse = ls.attention(q, k, v, pattern, backend="torch", return_lse=True)
    some = ls.attention(q[:, :, -fed:], k, v, pattern, backend="torch", return_lse=True)
    one = ls.attention(q[:, :, -1:], k, v, pattern, backend="torch", return_lse=True)
    for (new_out, new_lse), count in ((some, fed), (one, 1)):
        torch.testing.assert_close(new_out, out[:, :, -count:], rtol=0, atol=1e-12)
        torch.testing.assert_close(new_lse, lse[:, :, -count:], rtol=0, atol=1e-12)


def test_step_by_step_gives_the_full_run_where_the_pattern_is_causal():
    """A causal pattern's row needs the keys up to its own position alone: feed them one after another."""
    for pattern in (ls.Local(4) | ls.Strided(4), ls.Fixed(6, 2), ls.LogSparse(), ls.RandomBlocks(4, 2), ls.Global(2)):
        q, k, v = (x.detach() for x in make_inputs(1, 2, 2, 21, 21))
        full = ls.attention(q, k, v, pattern, backend="torch")
        for n in range(1, 22):
            step = ls.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], pattern, backend="torch")
            torch.testing.assert_close(step[:, :, 0], full[:, :, n - 1], rtol=0, atol=1e-12)
