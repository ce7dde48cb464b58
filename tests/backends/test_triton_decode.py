"""The decode kernel on the CPU, in Triton's interpreter, against the reference in float64; and that it compiles."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.interpreted import WHY_NOT, interpreter
from tests.oracle import TIMES_PLAIN
from tests.strategies import ATOMS, LONGEST, Thirds, patterns

import longstride as ls
from longstride.backends.decode_request import DecodeRequest
from longstride.backends.triton import decode as triton_decode
from longstride.backends.triton.decode import DecodeShape, decode_refusals, decode_shape, splits_for
from longstride.plan import layout
from longstride.plan.layout import SPILL

pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    # NumPy warns of what a GPU does in silence.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

NEAR = 2e-5
HEADS, DIM, V_DIM = 4, 20, 12
CAUSAL = [atom if atom.is_causal else atom & ls.Causal() for atom in ATOMS if not isinstance(atom, Thirds)]
CAUSAL = [pattern for pattern in CAUSAL if pattern.bind(LONGEST) == pattern]
# A walk along one region of a kind says nothing of another of the same kind.
CAUSAL += [
    ls.LogSparse(2) & ls.LogSparse(3),
    ls.Summary(6, 3) & ls.Summary(4, 2),
    ls.Global((2, 7)) & ls.Global((7, 20)),
]


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter():
        yield


def make(kv_heads=HEADS, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, V_DIM))
    return [torch.randn(batch, heads, LONGEST, dim, generator=generator).to(dtype) for heads, dim in shapes]


def check(pattern, kv_heads=HEADS, start=20, tokens=(1, 1, 1, 1), headroom=0, batch=1, counts=None):
    """Steps of the kernel after a prompt, against the reference; and what it writes, against the torch backend."""
    q, k, v = make(kv_heads, batch)
    wanted = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    caches = {}
    for backend in ("torch", "triton"):
        sizes = {"num_kv_heads": kv_heads, "head_dim": DIM, "v_head_dim": V_DIM, "headroom": headroom, "batch": batch}
        cache = caches[backend] = ls.PatternCache(pattern, capacity=LONGEST, num_heads=HEADS, **sizes)
        if start:
            prompt = (x[:, :, :start] for x in (q, k, v))
            ls.attention_cached(*prompt, pattern, cache, counts=counts, backend="torch")
            cache.advance()
        for step in tokens:
            turn = cache.lengths[:, None] + torch.arange(step)
            token = [x.gather(2, turn[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v)]
            out = ls.attention_cached(*token, pattern, cache, backend=backend)
            cache.advance()
            expected = wanted.gather(2, turn[:, None, :, None].expand(-1, HEADS, -1, V_DIM))
            error = (out.double() - expected).abs().max().item()
            assert error <= NEAR, f"{backend}, {pattern}, {cache.lengths.tolist()}: {error:.3g}"
    for ours, theirs in (
        (caches["triton"].keys, caches["torch"].keys),
        (caches["triton"].values, caches["torch"].values),
    ):
        ours[0][:, SPILL] = theirs[0][:, SPILL] = 0
        assert torch.equal(ours[0], theirs[0]), f"{pattern} is written elsewhere"


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_every_pattern(pattern, kv_heads):
    check(pattern, kv_heads)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(patterns(), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(0, 40))
def test_any_pattern_at_any_place(pattern, kv_heads, headroom, start):
    pattern = pattern if pattern.is_causal else pattern & ls.Causal()
    assume(pattern.bind(LONGEST) == pattern)
    assume("Thirds" not in str(pattern))
    check(pattern, kv_heads, start, (1, headroom + 1), headroom)


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Fixed(8, 2),
        ls.Local(5) | ls.Strided(5) | ls.Global((3, 22)),
        ls.per_head(ls.Local(7), ls.RandomBlocks(4, 2)),
        ls.RandomBlocks(4, 2) | ls.RandomBlocks(6, 1, seed=3) | ls.Local(3),
        (ls.Summary(6, 2) | ls.Dilated(3, 4)) & ls.Local(20),
    ],
    ids=str,
)
def test_rows_of_different_lengths_and_several_tokens(pattern):
    check(pattern, 2, 24, (1, 3, 2), headroom=2, batch=3, counts=torch.tensor([24, 7, 1]))


@pytest.mark.parametrize("programs", [1, 64])
def test_any_number_of_splits(monkeypatch, programs):
    """One program runs over all keys, or each over a tile of 16; the tail of a stretch may be empty."""
    monkeypatch.setattr(triton_decode, "decode_shape", lambda *_: DecodeShape(16, 4, programs))
    for pattern, kv_heads in ((ls.Causal(), 4), (ls.Causal(), 1), (ls.Local(18) | ls.Strided(3), 4)):
        check(pattern, kv_heads, 43, (1, 1))


def test_a_query_that_reads_nothing_gets_zeros():
    below = ls.BlockSparse(torch.ones(4, 4, dtype=torch.bool).tril(-1), 12)
    check(below, start=10)
    q, k, v = (x[:, :, :1] for x in make())
    sizes = {"num_heads": HEADS, "head_dim": DIM, "v_head_dim": V_DIM}
    cache = ls.PatternCache(below, capacity=LONGEST, **sizes)
    assert (ls.attention_cached(q, k, v, below, cache, backend="triton") == 0).all()


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_float16_is_as_precise_as_the_plain_computation(kv_heads):
    pattern = ls.Fixed(8, 2)
    q, k, v = make(kv_heads, dtype=torch.float16)
    truth = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    plain = ls.attention(q, k, v, pattern, backend="reference")
    sizes = {"num_heads": HEADS, "num_kv_heads": kv_heads, "head_dim": DIM, "v_head_dim": V_DIM, "dtype": q.dtype}
    cache = ls.PatternCache(pattern, capacity=LONGEST, **sizes)
    outs = []
    for position in range(30):
        token = (x[:, :, position : position + 1] for x in (q, k, v))
        outs.append(ls.attention_cached(*token, pattern, cache, backend="triton"))
        cache.advance()
    error, allowed = ((x[:, :, :30].double() - truth[:, :, :30]).norm() for x in (torch.cat(outs, 2), plain))
    assert error <= TIMES_PLAIN["out"] * allowed + 1e-3 * truth[:, :, :30].norm()


def test_tokens_are_read_as_they_lie():
    """[batch, tokens, heads, dim] transposed, as a projection writes them; and a last dim that is not contiguous."""
    for change in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        laid = [change(x[:, :, :3]) for x in make(batch=2)]
        cache = ls.PatternCache(
            ls.Local(5), capacity=9, batch=2, num_heads=HEADS, head_dim=DIM, v_head_dim=V_DIM, headroom=2
        )
        out = ls.attention_cached(*laid, ls.Local(5), cache, backend="triton")
        torch.testing.assert_close(out, ls.attention(*laid, ls.Local(5), backend="reference"))


def test_refusals():
    thirds = Thirds() & ls.Causal()

    def request(pattern, dtype=torch.float32, dim=64):
        return DecodeRequest(layout(pattern, 100, 1, 1), dim, dim, dtype, "cuda")

    assert decode_refusals(request(ls.Local(5))) == []
    assert "none of float16" in decode_refusals(request(ls.Local(5), dtype=torch.float64))[0]
    assert "exceeds 256" in decode_refusals(request(ls.Local(5), dim=300))[0]
    assert "the user's own Python code" in decode_refusals(request(thirds))[0]
    cache = ls.PatternCache(thirds, capacity=9, num_heads=HEADS, head_dim=DIM, v_head_dim=V_DIM)
    q, k, v = (x[:, :, :1] for x in make())
    with pytest.raises(ls.UnsupportedError, match=r"'triton' was asked for, but the rule of Thirds") as caught:
        ls.attention_cached(q, k, v, thirds, cache, backend="triton")
    assert "torch: takes it: pass backend='torch'" in str(caught.value)


def test_splits_fill_the_device_and_leave_no_program_without_a_tile():
    shape = DecodeShape(keys=64, warps=4, programs=264)
    assert splits_for(shape, programs=8, span=64) == 1
    assert splits_for(shape, programs=8, span=1024) == 16
    assert splits_for(shape, programs=8, span=10**6) == 32
    assert splits_for(shape, programs=512, span=10**6) == 1
    assert splits_for(shape, programs=1, span=10**6) == 64
    for family in ("hopper", "other", "interpreter"):
        for dtype in (torch.float32, torch.bfloat16):
            for dim in (16, 64, 128, 256):
                assert decode_shape(family, dtype, dim, 1, 4096).keys * dim <= 64 * 256


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import longstride as ls
from longstride.backends.triton import decode_kernel
from longstride.backends.triton.decode_lowering import lower_layout
from longstride.plan import layout

for pattern, kv_heads, tokens in (
    (ls.Fixed(128, 8), 8, 1),
    (ls.Local(64) | ls.Strided(64) | ls.Global((3, 77)) | ls.LogSparse() | ls.RandomBlocks(64, 2), 2, 3),
):
    made = layout(pattern, 4096, 8, kv_heads, tokens - 1)
    for launch in lower_layout(made, torch.device("cpu")).launches:
        tensors = dict.fromkeys(("q", "new_k", "new_v", "keys", "values"), "*bf16") | {"lengths": "*i64"}
        tensors |= dict.fromkeys(("lanes", "spots", "lists"), "*i32") | {"out": "*bf16"}
        tensors |= dict.fromkeys(("part_acc", "part_peak", "part_total"), "*fp32") | {"arrivals": "*i32"}
        strides = [f"{x}_{dim}" for x in "qkv" for dim in ("batch", "head", "token")]
        numbers = dict.fromkeys((*strides, "rows", "heads"), "i32") | {"scale": "fp32"}
        packed = 1 if made.share == 1 else 16
        constants = {
            "PROGRAM": launch.program, "SPOTS": launch.spots.shape[1], "TOKENS": tokens, "SHARE": made.share,
            "SPLITS": 4, "HEAD_DIM": 64, "V_HEAD_DIM": 64, "BLOCK_D": 64, "BLOCK_DV": 64, "BLOCK_G": packed,
            "BLOCK_N": 64, "BLOCK_T": max(packed, 4), "UPCAST": False, "PRECISION": "ieee",
        }
        signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
        source = ASTSource(decode_kernel.decode, signature, constexprs=constants)
        made_for = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "ptx" in made_for.asm
print("compiled")
"""


def test_the_kernel_compiles_for_hopper(tmp_path, monkeypatch):
    """The compiler refuses things that the interpreter does; it needs no device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
