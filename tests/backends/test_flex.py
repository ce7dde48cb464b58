"""The mask that FlexAttention is given, and when it is asked at all; it runs in tests/gpu."""

import pytest
import torch
from tests.oracle import make_inputs
from tests.strategies import ATOMS, Thirds, random_table
from torch.nn.attention import flex_attention as pytorch

import longstride as ls
from longstride.attention import BACKENDS, describe
from longstride.backends import flex, reference
from longstride.backends.request import Request
from longstride.dispatch.choice import choose

CPU = torch.device("cpu")
HEADS = [
    ls.per_head(ls.Local(5), Thirds()),
    ls.per_head(ls.Summary(6, 2), ls.Full(), ls.LogSparse(), ls.Local(3)),
    ls.BlockSparse(random_table(0, 8, 2, length=320), 8) | ls.Local(2),
    ls.RandomBlocks(16, 2) & ls.Strided(3),
]


THIRDS = Thirds()


def request(pattern=THIRDS, length=300, kv_len=None, dtype=torch.bfloat16, dim=64, device="cuda", **others):
    kv_len = length if kv_len is None else kv_len
    return Request(pattern, (1, 4, length, dim), (1, 2, kv_len, dim), (1, 2, kv_len, dim), dtype, device, **others)


@pytest.mark.parametrize("pattern", [p for p in ATOMS if not isinstance(p, ls.BlockSparse)] + HEADS, ids=str)
@pytest.mark.parametrize("size", [(300, 300), (128, 256), (1, 200), (130, 290)])
def test_the_mask_is_the_pattern(pattern, size, monkeypatch):
    """Pair by pair by `mask_mod`, and block by block; however few rows pass by at once."""
    monkeypatch.setattr(flex, "SLAB", 128 * 290)
    wanted = pattern.mask(*size, heads=4)
    rule = flex.mask_mod(pattern, *size, 4)
    assert torch.equal(pytorch.create_mask(rule, 1, 4, *size, device="cpu")[0], wanted)
    made = flex.block_mask.__wrapped__(pattern, *size, 4, CPU)
    theirs = pytorch.create_block_mask(rule, 1, 4, *size, device="cpu")
    assert made.shape[-2:] == size
    heads = made.kv_num_blocks.shape[1]
    assert heads == (4 if len(set(pattern.split_heads(4))) > 1 else 1)
    for ours, full in ((made, False), (made, True)):
        names = ("full_kv_num_blocks", "full_kv_indices") if full else ("kv_num_blocks", "kv_indices")
        counts, numbers = (getattr(ours, name).expand(-1, 4, *[-1] * n) for n, name in enumerate(names, 1))
        their_counts, their_numbers = (getattr(theirs, name) for name in names)
        assert torch.equal(counts, their_counts)
        used = torch.arange(numbers.shape[-1]) < counts[..., None]
        assert torch.equal(numbers[used], their_numbers[used])


@pytest.mark.filterwarnings("ignore")  # PyTorch's own: it is slow without compilation
@pytest.mark.parametrize("pattern", [Thirds() | ls.Local(4), ls.per_head(ls.Local(5), Thirds())], ids=str)
def test_flex_attention_with_this_mask_is_the_reference(pattern, monkeypatch):
    monkeypatch.setattr(pytorch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    q, k, v = (x.detach() for x in make_inputs(2, 4, 2, 140, 200, 16, dtype=torch.float32))
    mask = flex.block_mask(pattern, 140, 200, 4, CPU)
    aux = pytorch.AuxRequest(lse=True)
    out, aux = pytorch.flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True, return_aux=aux)
    wanted, wanted_lse = reference.forward(q, k, v, pattern, 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_what_it_takes_and_what_not():
    assert flex.refusals(request()) == []
    assert flex.refusals(request(dtype=torch.float32, length=1, kv_len=300)) == []
    for asked, words in (
        (request(device="cpu"), "tensors are on cpu"),
        (request(dtype=torch.float64), "torch.float64 is none of"),
        (request(dim=8), "head_dim 8 is not between 16 and 256"),
        (request(dim=512), "v_head_dim 512 is not between"),
        (request(length=2**19), "on 274,877,906,944 pairs"),
    ):
        assert words in "; ".join(flex.refusals(asked))


def test_it_goes_first_for_rules_of_ones_own_alone(monkeypatch):
    monkeypatch.setattr(BACKENDS["triton"], "refusals", lambda _: ["not here"])
    for pattern in (Thirds(), Thirds() | ls.Local(4), ls.per_head(ls.Local(4), Thirds()), ls.Local(4) & Thirds()):
        assert choose(request(pattern))[0] == "flex"
    assert "the rule of Thirds() is the user's own" in str(describe(request(Thirds() | ls.Local(4))))
    for asked in (request(ls.bigbird(16)), request(device="cpu"), request(varlen=True), request(dtype=torch.float64)):
        assert choose(asked)[0] == "torch"
    # Inside an operator, as in compiled code, it cannot run.
    assert choose(request(), operators_only=True)[0] == "torch"


def test_it_is_not_for_compiled_code():
    torch.compiler.reset()
    q = torch.zeros(1, 2, 20, 16)
    with pytest.raises(Exception, match="the flex backend compiles itself"):
        torch.compile(lambda q: ls.attention(q, q, q, Thirds(), backend="flex"), fullgraph=True, backend="eager")(q)
    torch.compiler.reset()
