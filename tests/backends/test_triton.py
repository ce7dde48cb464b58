"""The Triton kernels on the CPU, in Triton's interpreter, against the reference in float64.

Tiles are 16 rows there, so that short sequences have many. bfloat16 is left to tests/gpu: the interpreter multiplies
its bit patterns as integers.
"""

import gc
import importlib
import weakref

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tests.interpreted import WHY_NOT, interpreter
from tests.oracle import (
    assert_as_precise_as_plain,
    assert_blind,
    assert_same,
    attend,
    make_inputs,
    results,
)
from tests.strategies import ATOMS, Thirds, lengths, patterns, random_table
from tests.test_attention_varlen import make_packed, one_by_one, packed

import longstride as ls
from longstride.attention import attention_stacked
from longstride.backends import recorded
from longstride.backends import triton as triton_backend
from longstride.backends.layout import heads_of
from longstride.backends.request import Request
from longstride.backends.triton import lowering, tuning
from longstride.plan import KINDS

pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    # NumPy warns of what a GPU does in silence: inf - inf of huge keys that a mask then hides.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

#: The largest difference from the float64 reference: float32 numbers below 10, and nothing that a lost pair could pass.
NEAR = 2e-5

MERGED = ls.Local(4) | ls.Strided(4)
#: A pattern without a pair at the lengths of these tests.
NOTHING = ls.Local(3) & ls.Global((90,))
TAKEN = tuple(atom for atom in ATOMS if not isinstance(atom, Thirds))


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter():
    with interpreter():
        yield


@pytest.fixture
def launch():
    """The module that prepares launches; what it remembers is forgotten before and after, so that it can be changed."""
    module = importlib.import_module("longstride.backends.triton.prepare")
    module.forget()
    yield module
    module.forget()


@pytest.fixture
def general(launch, monkeypatch):  # noqa: ARG001 - forgets what was prepared with cells
    """Short sequences go as long ones do: no closed cells, and stretches without a mask where there are any."""
    monkeypatch.setattr(tuning, "cell_shape", lambda *_: None)
    monkeypatch.setattr(tuning, "LONG", 0)


def assert_triton_is_reference(pattern, q_len, kv_len, *, scale=None, through_lse=True, **shape):
    """out, lse and all gradients in float32."""
    shape = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": 5, "v_dim": 7} | shape
    inputs = make_inputs(q_len=q_len, kv_len=kv_len, dtype=torch.float32, **shape)
    assert_near(attend(pattern, "triton", scale), attend(pattern, "reference", scale), inputs, through_lse)


def assert_near(compute, truth, inputs, through_lse=True):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = results(compute, inputs, through_lse=through_lse)
    wanted = results(truth, exact, through_lse=through_lse)
    assert_same({name: x.double() for name, x in got.items()}, wanted, NEAR)


def launches(pattern, length, heads=2, kv_heads=1):
    low = lowering.lowered(ls.plan(pattern, length, length, heads), kv_heads)
    return (*low.queries, *low.keys)


# ---- every kind of part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", TAKEN, ids=str)
def test_an_atom_is_computed(pattern):
    for size in ((35, 35), (1, 33)):
        assert_triton_is_reference(pattern, *size)


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("pattern", TAKEN, ids=str)
def test_an_atom_is_computed_as_if_it_were_long(pattern):
    assert_triton_is_reference(pattern, 35, 35, kv_heads=2)
    assert_triton_is_reference(pattern, 5, 40)


#: What an atom does not show: parts of one launch that share no pair, results merged over launches, heads that differ.
JOINED = [
    MERGED,
    ls.Local(20) | ls.Fixed(8, 2),
    ls.Strided(4) | ls.Fixed(16, 4) | ls.Global(3),
    ls.Strided(3) | ls.Strided(4) | ls.LogSparse(),
    ls.longformer(6, (0, 9, 30)),
    ls.bigbird(8),
    ls.LogSparse() | ls.Summary(6, 2),
    ls.RandomBlocks(8, 2) | ls.Global((2, 7)),
    ls.Local(5) & ls.Fixed(8, 2),
    ls.Strided(2) & ls.Global((2, 7, 11), causal=False),
    ls.RandomBlocks(8, 2) | ls.Strided(5),
    ls.BlockSparse(random_table(1, 20), 20) | ls.Local(2),
    ls.per_head(ls.Local(5), ls.Strided(5)),
    ls.per_head(ls.Global((2, 7)), ls.BlockLocal(20)) | ls.Local(2),
    ls.BlockSparse(random_table(2, 8, 4), 8),
]


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("pattern", JOINED, ids=str)
def test_parts_that_are_joined(pattern):
    heads = max(2, pattern.num_heads or 1)
    assert_triton_is_reference(pattern, 35, 35, heads=heads, kv_heads=heads // 2)


def test_every_owner_and_source_is_among_them():
    made = [launch for pattern in (*TAKEN, *JOINED) for launch in launches(pattern, 40, 4)]
    assert {launch.owner for launch in made} == set(range(4))
    assert {source.kind for launch in made for source in launch.sources} == set(range(6))
    assert {part.kind for launch in made for part in launch.parts} == set(KINDS)
    asked = {condition[0] for launch in made for source in launch.sources for condition in source.keep}
    left_out = {kind for launch in made for source in launch.sources for term in source.drop for kind, _ in term}
    assert asked | left_out == set(range(11))


# Without shrinking: at the interpreter's pace it takes minutes.
@settings(
    max_examples=15,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(
    pattern=patterns(),
    size=lengths(24),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, None, 0.0, -0.5]),
    through_lse=st.booleans(),
)
def test_any_request_is_computed(pattern, size, kv_heads, scale, through_lse):
    assume(not lowering.obstacles(ls.plan(pattern, *size, 4)))
    assert_triton_is_reference(
        pattern, *size, heads=4, kv_heads=kv_heads, dim=3, v_dim=2, scale=scale, through_lse=through_lse
    )


# ---- closed cells ---------------------------------------------------------------------------------------------------

#: Classes and blocks in one tile, several of them in one tile, and in two tiles; the heads of keys that these take.
CELLS = [
    (ls.Strided(5), 80, 1),
    (ls.Strided(5), 37, 1),
    (ls.Strided(4, causal=False), 33, 2),
    (ls.Strided(2), 80, 2),
    (ls.Strided(2, causal=False), 71, 2),
    (ls.BlockLocal(24), 80, 1),
    (ls.BlockLocal(5, causal=False), 33, 2),
    (ls.BlockLocal(40), 80, 2),
    (ls.BlockLocal(36, causal=False), 71, 2),
    (ls.Dilated(4, 3), 50, 1),
    (ls.Strided(5) | ls.Strided(7), 40, 2),
]


@pytest.mark.parametrize(("pattern", "length", "kv_heads"), CELLS, ids=str)
def test_cells_in_one_kernel_and_in_the_general_ones(pattern, length, kv_heads, launch, monkeypatch):
    for q_len in (length, length // 4):
        assert_triton_is_reference(pattern, q_len, length, kv_heads=kv_heads)
    monkeypatch.setattr(tuning, "cell_shape", lambda *_: None)
    monkeypatch.setattr(tuning, "LONG", 0)
    launch.forget()
    assert_triton_is_reference(pattern, length, length, kv_heads=kv_heads)


def test_cells_take_one_tile_several_a_tile_and_two_tiles(launch):
    found = set()
    for pattern, length, kv_heads in CELLS:
        shapes = launch.Shapes(length, length, 2, kv_heads, 5, 7, torch.float32, torch.device("cpu"), False)
        for kind, job in launch.prepare(pattern, shapes).backward:
            if kind == "cell":
                found.add((job.settings["CLASSES"], job.settings["BLOCK_B"] > 0, job.settings["PACK"] > 1))
    classes = {(True, False, False), (True, False, True), (True, True, False)}
    assert found == {*classes, (False, False, False), (False, True, False)}


# ---- shapes, strides, scales ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("dims", [(1, 1), (5, 20), (24, 3), (48, 80), (16, 32)])
def test_any_head_dim(dims):
    for pattern in (MERGED, ls.LogSparse(3)):
        assert_triton_is_reference(pattern, 17, 17, dim=dims[0], v_dim=dims[1])


def assert_absent_keys_stay_out(pattern):
    """With a log-sum-exp of -300, the weight of a key that is nothing but zeros would be infinite."""
    ones = torch.ones(1, 1, 35, 8)
    exact = [x.double().requires_grad_() for x in (10 * ones, torch.randn_like(ones) - 10, torch.randn_like(ones))]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    got, wanted = results(attend(pattern, "triton"), inputs), results(attend(pattern, "reference"), exact)
    assert (wanted["lse"] < -200).all()
    for name, truth in wanted.items():
        torch.testing.assert_close(got[name].double(), truth, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pattern", [ls.Full(), ls.Local(5, lookahead=4), ls.Strided(2, causal=False)], ids=str)
def test_keys_past_the_end_are_not_there_however_low_the_scores(pattern):
    assert_absent_keys_stay_out(pattern)


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("pattern", [ls.Full(), ls.Local(25, lookahead=24)], ids=str)
def test_keys_past_the_end_are_not_there_in_long_sequences_either(pattern):
    assert_absent_keys_stay_out(pattern)


def test_patterns_that_depend_on_the_length_take_no_packed_documents():
    shapes = ((1, 2, 64, 8),) * 3
    asked = Request(ls.RandomBlocks(16, 2, causal=False), *shapes, torch.float32, "cpu", varlen=True)
    assert any("depends on the length" in reason for reason in triton_backend.refusals(asked))
    asked = Request(ls.RandomBlocks(16, 2), *shapes, torch.float32, "cpu", varlen=True)
    assert triton_backend.refusals(asked) == []


def test_tiles_of_one_kind_of_product():
    """Fewer than 64 rows take other units than 64: in one loop they must not meet."""
    for own in (16, 32, 64, 128):
        assert (own < 64) == (tuning.beside_keys(own, 64) < 64)
    for dim in (16, 64, 128, 256):
        for span in (1, 20, 100, 300, 5000):
            shape = tuning.shape("backward_kv", "hopper", torch.bfloat16, dim, span)
            assert (shape.own < 64) == (shape.other < 64)


@pytest.mark.parametrize(
    ("pattern", "grows"),
    [
        (ls.Causal(), True),
        (ls.Fixed(32, 8), True),
        (ls.Local(4) | ls.Summary(16, 2), True),
        (ls.Local(40), False),
        (ls.BlockLocal(32), False),
        (ls.Strided(4), False),
        (ls.Dilated(5, 3), False),
        (ls.Global(4), False),
        (ls.bigbird(16), False),
    ],
    ids=str,
)
def test_heads_go_first_where_work_grows_along_the_sequence(launch, pattern, grows):
    shape = torch.Size((1, 2, 200, 16))
    made = launch.prepare_batched(pattern, shape, shape, 16, torch.float32, torch.device("cpu"), False)
    jobs = [*made.forward, *(job for _, job in made.backward)]
    first = [job.settings["HEADS_FIRST"] for job in jobs if "HEADS_FIRST" in job.settings]
    assert any(first) == grows


def test_only_what_no_launch_stores_is_filled(launch):
    def prepared(pattern, heads=2, kv_heads=2, length=60):
        shape, keys = torch.Size((1, heads, length, 16)), torch.Size((1, kv_heads, length, 16))
        return launch.prepare_batched(pattern, shape, keys, 16, torch.float32, torch.device("cpu"), False)

    union = prepared(ls.Local(10) | ls.Strided(10))
    assert not union.filled
    assert union.grads_filled == (False, False)
    stores = [not job.settings.get("ADD", job.settings.get("ADD_KV")) for _, job in union.backward]
    assert stores == sorted(stores, reverse=True), "a launch adds before the one that stores"
    assert prepared(ls.Summary(12, 3)).grads_filled == (False, True)  # keys outside of every group have no launch
    assert prepared(ls.per_head(ls.Local(3), ls.Local(3) & ls.Global((90,)))).filled  # a head without a pair
    # A cell that stores grad_q runs first, and adds to grad_k and grad_v of a key head that others write too.
    assert prepared(ls.per_head(ls.RandomBlocks(4, 1), ls.Full()), kv_heads=1, length=20).grads_filled == (False, True)


@pytest.mark.parametrize(
    "second", [ls.RandomBlocks(4, 1), ls.Summary(6, 2), ls.Local(3) | ls.Strided(3), ls.LogSparse()], ids=str
)
def test_heads_that_share_keys_but_no_kernel(second):
    """Gradients of keys come from closed cells and from others, in either order of the heads."""
    for first in (ls.Full(), ls.Strided(4)):
        for pattern in (ls.per_head(first, second), ls.per_head(second, first)):
            assert_triton_is_reference(pattern, 20, 20)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
def test_heads_that_share_keys(heads):
    for pattern in (ls.Local(5), ls.Strided(3), ls.Fixed(8, 2)):
        assert_triton_is_reference(pattern, 19, 19, batch=2, heads=heads[0], kv_heads=heads[1])


@pytest.mark.usefixtures("general")
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize(
    "pattern", [MERGED, ls.Local(20), ls.LogSparse(3), ls.BlockLocal(40), ls.RandomBlocks(8, 2)], ids=str
)
def test_any_scale(pattern, scale):
    assert_triton_is_reference(pattern, 34, 34, scale=scale, heads=1)


@pytest.mark.parametrize("pattern", [MERGED, ls.Local(20) | ls.Global(2), ls.LogSparse(4), ls.BlockLocal(40)], ids=str)
def test_any_strides(pattern):
    """Tokens before heads, every other number of a row, keys that heads share in memory, expanded gradients."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 34, 2, 10, generator=random).transpose(1, 2)[..., ::2]
    k = torch.randn(1, 1, 34, 5, generator=random).expand(1, 2, 34, 5)
    v = torch.randn(1, 7, 34, 2, generator=random).permute(0, 3, 2, 1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert [x.is_contiguous() for x in leaves] == [False] * 3
    copies = [x.detach().contiguous().requires_grad_() for x in leaves]
    for weight in (torch.ones(()).expand(1, 2, 34, 7), torch.randn(7, 34, 2, 1, generator=random).permute(3, 2, 1, 0)):
        into_lse = torch.full((1,), 0.5).expand(1, 2, 34)
        found = []
        for tensors in (leaves, copies):
            out, lse = ls.attention(*tensors, pattern, backend="triton", return_lse=True)
            assert (out.transpose(1, 2) if tensors is leaves else out).is_contiguous()
            incoming = (weight, into_lse) if tensors is leaves else (weight.contiguous(), into_lse.contiguous())
            found.append((out, lse, *torch.autograd.grad((out, lse), tensors, incoming)))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    assert_near(attend(pattern, "triton"), attend(pattern, "reference"), leaves)


@pytest.mark.parametrize("pattern", [MERGED, ls.Fixed(8, 2), ls.LogSparse(4), ls.RandomBlocks(8, 2)], ids=str)
def test_offsets_of_64_bits_and_grids_cut_into_pieces(pattern, monkeypatch):
    calls = importlib.import_module("longstride.backends.triton.launch")
    monkeypatch.setattr(calls, "_wide", lambda *_: True)
    monkeypatch.setattr(calls, "MOST_IN_GRID", 2)
    assert_triton_is_reference(pattern, 20, 20, batch=3)


def test_the_same_again_bit_by_bit():
    inputs = make_inputs(1, 2, 1, 40, 40, dtype=torch.float32)
    first, second = (results(attend(MERGED, "triton"), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [ls.Local(9), ls.Strided(3), ls.Strided(2), MERGED, ls.Fixed(8, 2), ls.LogSparse(4), ls.RandomBlocks(16, 2)],
    ids=str,
)  # fmt: skip
def test_as_precise_as_the_plain_computation(pattern, dtype):
    assert_as_precise_as_plain(pattern, 33, 40, dtype, "triton", kv_heads=1, dim=12, v_dim=5)


# ---- what may not be seen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*TAKEN, MERGED], ids=str)
def test_nothing_is_seen_past_the_rule(pattern):
    assert_blind(pattern, 34, 34, 19, "triton", torch.finfo(torch.float32).max, heads=1, kv_heads=1)


UNSEEN = [
    (MERGED, 3),
    (ls.Local(5), 20),
    (ls.Dilated(3, 4, lookahead=1), 7),
    (ls.Strided(5), 3),
    (ls.BlockLocal(20), 12),
    (ls.BlockLocal(36, causal=False), 3),
    (ls.Fixed(8, 2), 3),
    (ls.Summary(6, 2), 40),
    (ls.LogSparse(), 3),
    (ls.RandomBlocks(4, 2), 3),
    (ls.longformer(4, (0, 9)), 5),
]


@pytest.mark.parametrize("cells", [True, False])
@pytest.mark.parametrize(("pattern", "q_len"), UNSEEN, ids=str)
def test_gradients_do_not_pass_the_rule(pattern, q_len, cells, request):
    """Keys and values that no query may see, as large as they can be, change no number and get a gradient of 0."""
    if not cells:
        request.getfixturevalue("general")
    q, k, v = make_inputs(1, 2, 2, q_len, 40, dtype=torch.float32)
    seen = pattern.mask(q_len, 40, heads=2).any(1)[None, :, :, None]
    assert not seen.all()
    signs = torch.tensor([1.0, -1.0]).repeat(2)
    most = torch.finfo(torch.float32).max
    poisoned = [torch.where(seen, x.detach(), most * signs).requires_grad_() for x in (k, v)]
    clean, found = (results(attend(pattern, "triton"), tensors) for tensors in ((q, k, v), (q, *poisoned)))
    for name, before in clean.items():
        assert torch.equal(found[name], before), name
    for name in ("grad_k", "grad_v"):
        assert not found[name][~seen.expand_as(found[name])].any()


@pytest.mark.parametrize(
    "pattern",
    [
        ls.Summary(6, 2),
        ls.Global((9, 20)),
        ls.Strided(4) & ls.Summary(6, 2),
        ls.BlockSparse(torch.ones(8, 8, dtype=torch.bool).tril(-1), 5),
        ls.BlockLocal(6) & ls.Summary(6, 1),
        ls.per_head(ls.Summary(6, 2), ls.Local(3)),
        NOTHING,
        ls.per_head(ls.Local(3), NOTHING),
    ],
    ids=str,
)
def test_queries_without_keys_are_zero_everywhere(pattern):
    q, k, v = make_inputs(1, 2, 2, 30, 30, 4, 6, dtype=torch.float32)
    empty = ~pattern.mask(30, heads=2).any(-1).expand(1, 2, 30)
    assert empty.any()
    out, lse = ls.attention(q, k, v, pattern, backend="triton", return_lse=True)
    assert not out[empty].any()
    assert (lse[empty] == -torch.inf).all()
    # Gradients that flow into those rows end there, whatever they are.
    into_out, into_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (into_out, into_lse), retain_graph=True)
    assert not grads[0][empty].any()
    quiet = torch.autograd.grad((out, lse), (q, k, v), (into_out * ~empty[..., None], into_lse * ~empty))
    for a, b in zip(grads, quiet, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


# ---- packed documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        MERGED,
        ls.Local(20) | ls.Fixed(8, 2),
        ls.longformer(6, (0, 9, 30)),
        ls.RandomBlocks(16, 2),
        ls.Strided(2),
        ls.BlockLocal(20),
        ls.LogSparse(3),
        ls.per_head(ls.Local(5), ls.Strided(5)),
    ],
    ids=str,
)
def test_packed_documents(pattern):
    # Empty ones at either end and within, single tokens, one that two tiles hold.
    documents = [0, 9, 1, 0, 21, 0]
    inputs = make_packed(sum(documents), 2, 1, 5, 3, dtype=torch.float32)
    assert_near(packed(pattern, documents, "triton", max_seqlen=40), one_by_one(pattern, documents), inputs)


def test_a_document_does_not_see_another():
    q, k, v = (x.detach() for x in make_packed(60, 2, 2, dtype=torch.float32))
    for pattern in (ls.Full(), MERGED, ls.BlockLocal(16, causal=False)):
        before = packed(pattern, [20, 22, 18], "triton")(q, k, v)
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:20] = x[42:] = torch.finfo(torch.float32).max
        after = packed(pattern, [20, 22, 18], "triton")(*changed)
        assert all(torch.equal(a[20:42], b[20:42]) for a, b in zip(before, after, strict=True))


# ---- what is taken, and what is chosen ------------------------------------------------------------------------------


def request_of(pattern, length=64, heads=2, dim=8, **others):
    shape = (1, heads, length, dim)
    return Request(pattern, shape, shape, shape, **({"dtype": torch.float32, "device_type": "cpu"} | others))


TWO_TABLES = ls.BlockSparse(random_table(0, 4), 4) & ls.BlockSparse(random_table(1, 8), 8)

REFUSED = [
    (request_of(Thirds()), "the user's own Python code"),
    (request_of(Thirds() & ls.Local(9)), "the user's own Python code"),
    (request_of(TWO_TABLES), "a second block table, of other blocks"),
    (request_of(ls.Local(3), dtype=torch.float64), "float64 is none of float16, bfloat16, float32"),
    (request_of(ls.Local(3), dim=300), "head_dim 300 or v_head_dim 300 exceeds 256"),
    (request_of(ls.Local(3), length=1 << 30), "32-bit arithmetic"),
    (request_of(ls.Dilated(2, 1 << 25), length=1 << 27), "steps too far for 32-bit positions"),
]


@pytest.mark.parametrize(("request_", "words"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_kernels_cannot_do_is_said(request_, words):
    assert any(words in refusal for refusal in triton_backend.refusals(request_)), triton_backend.refusals(request_)


def test_a_refusal_names_the_backend_that_takes_it():
    q, k, v = make_inputs(1, 2, 2, 20, 20, dtype=torch.float32)
    with pytest.raises(ls.UnsupportedError, match=r"'triton' was asked for.*own Python code(.|\n)*torch: takes it"):
        ls.attention(q, k, v, Thirds(), backend="triton")


@pytest.mark.parametrize("recording", [False, True])
def test_what_a_graph_reads_outlives_the_caches(launch, monkeypatch, recording):
    """A replay goes by addresses: evaluations at hundreds of lengths in between must not free what is there."""
    monkeypatch.setattr(recorded, "recording", lambda _: recording)
    monkeypatch.setattr(recorded, "_kept", {})
    inputs, starts = make_inputs(1, 2, 2, 12, 12, 4, dtype=torch.float32), torch.tensor([0, 5, 12])
    rule = ls.Local(3) | ls.Global((0, 7))
    packed_inputs = [x.detach()[0].transpose(0, 1) for x in inputs]
    with torch.no_grad():
        ls.attention(*inputs, rule, backend="triton")
        ls.attention_varlen(*packed_inputs, starts, rule, max_seqlen=7, backend="triton")
    q, k, v = inputs
    made = [triton_backend._prepared(q, k, v, rule), triton_backend._prepared_varlen(*packed_inputs, 7, rule)]
    references = [weakref.ref(each) for each in made]
    del made
    launch.forget()
    gc.collect()
    assert [reference() is not None for reference in references] == [recording] * 2


def test_interpreted_kernels_are_only_for_checking(monkeypatch):
    q, k, v = make_inputs(1, 2, 2, 20, 20, dtype=torch.float32)
    explanation = ls.explain(q, k, v, MERGED)
    assert explanation.backend == "torch"
    assert explanation.reasons["triton"].startswith("only used when named")
    assert ls.explain(q, k, v, MERGED, backend="triton").backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "device cpu is not cuda" in ls.explain(q, k, v, MERGED).reasons["triton"]


@pytest.mark.parametrize("pattern", [MERGED, ls.Strided(4), ls.Fixed(8, 2)], ids=str)
def test_gradients_side_by_side(pattern):
    """Written into a single tensor, whose strides are not those of q, k and v by themselves; one that is misaligned."""
    for qk_width, width in ((16, 32), (6, 10)):
        rows = torch.randn(1, 21, 2 * qk_width + width, requires_grad=True)
        out = attention_stacked(rows, pattern, heads=2, qk_width=qk_width, backend="triton")
        (found,) = torch.autograd.grad(out.sin().sum(), rows)
        truth = ls.attention(*heads_of(rows, 2, qk_width), pattern, backend="reference")
        (expected,) = torch.autograd.grad(truth.sin().sum(), rows)
        torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_operator_is_registered_as_pytorch_asks():
    by_head = make_inputs(1, 2, 1, 12, 12, 4, 6, dtype=torch.float32)
    by_token = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in by_head]
    for inputs in (by_head, by_token):
        checks = torch.library.opcheck(torch.ops.longstride.attention, (*inputs, "Local(3)", 0.5, "triton"))
        assert set(checks.values()) == {"SUCCESS"}
