"""Decoding on a CUDA device: the kernel against the float64 reference, graphs, memory, and the model."""

from __future__ import annotations

import itertools

import pytest
import torch

import longstride as ls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PATTERNS = [
    ls.Causal(),
    ls.Local(17),
    ls.Dilated(9, 4),
    ls.Strided(16),
    ls.BlockLocal(32),
    ls.Summary(32, 4),
    ls.Fixed(32, 8),
    ls.LogSparse(),
    ls.Global((3, 150)),
    ls.RandomBlocks(16, 2),
    ls.Local(24) | ls.Strided(24),
    ls.Strided(16) | ls.Fixed(32, 4) | ls.Global(3),
    ls.Local(20) | ls.RandomBlocks(16, 2) | ls.Global(2),
    (ls.Summary(32, 4) | ls.Dilated(9, 4)) & ls.Local(100),
    ls.BlockSparse(torch.rand(13, 13, generator=torch.Generator().manual_seed(0)) > 0.5, 16) & ls.Causal(),
    ls.per_head(ls.Local(24), ls.Fixed(32, 4)),
]

#: The largest relative error ||a - b|| / ||b|| against float64 on the same rounded inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTH = 200


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


def make(kv_heads: int, head_dim: int, v_dim: int, dtype: torch.dtype, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(head_dim + kv_heads)
    shapes = ((8, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
    return [torch.randn(batch, heads, LENGTH, dim, device="cuda", dtype=dtype) for heads, dim in shapes]


def cache_for(
    pattern: ls.Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: int
) -> ls.PatternCache:
    sizes = {"num_heads": q.shape[1], "num_kv_heads": k.shape[1], "head_dim": q.shape[3], "v_head_dim": v.shape[3]}
    return ls.PatternCache(pattern, capacity=LENGTH, batch=len(q), dtype=q.dtype, device="cuda", **sizes, **changes)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_decodes_every_pattern(pattern: ls.Pattern, dtype: torch.dtype) -> None:
    for (head_dim, v_dim, kv_heads), tokens in itertools.product([(64, 64, 8), (128, 64, 2), (20, 36, 1)], [1, 4]):
        q, k, v = make(kv_heads, head_dim, v_dim, dtype)
        wanted = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
        cache = cache_for(pattern, q, k, v, headroom=tokens - 1)
        outs = []
        for start, stop in itertools.pairwise([0, 90, *range(90 + tokens, LENGTH + 1, tokens)]):
            part = [x[:, :, start:stop] for x in (q, k, v)]
            outs.append(ls.attention_cached(*part, pattern, cache, backend="triton" if start else None))
            cache.advance()
        found = torch.cat(outs, 2)
        error = relative_error(found, wanted[:, :, : found.shape[2]])
        assert error <= TOLERANCE[dtype], (error, head_dim, v_dim, kv_heads, tokens)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_of_different_lengths(pattern: ls.Pattern) -> None:
    q, k, v = make(4, 32, 32, torch.float32, batch=3)
    wanted = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    cache = cache_for(pattern, q, k, v)
    counts = torch.tensor([100, 37, 1], device="cuda")
    ls.attention_cached(*(x[:, :, :100] for x in (q, k, v)), pattern, cache, counts=counts)
    cache.advance()
    for _ in range(90):
        turn = cache.lengths.clone()[:, None, None, None]
        token = [x.gather(2, turn.expand(-1, x.shape[1], 1, x.shape[3])) for x in (q, k, v)]
        out = ls.attention_cached(*token, pattern, cache, backend="triton")
        cache.advance()
        assert relative_error(out, wanted.gather(2, turn.expand(-1, 8, 1, 32))) <= 1e-5


def test_the_kernel_is_chosen_and_the_torch_backend_agrees() -> None:
    pattern = ls.Local(24) | ls.Strided(24)
    q, k, v = make(8, 64, 64, torch.bfloat16)
    outs = []
    for backend in (None, "triton", "torch", "reference"):
        cache = cache_for(pattern, q, k, v)
        ls.attention_cached(*(x[:, :, :100] for x in (q, k, v)), pattern, cache)
        cache.advance()
        outs.append(ls.attention_cached(*(x[:, :, 100:101] for x in (q, k, v)), pattern, cache, backend=backend))
    assert torch.equal(outs[0], outs[1])
    assert relative_error(outs[1], outs[3]) <= 1e-2
    assert relative_error(outs[2], outs[3]) <= 1e-2


@pytest.mark.parametrize("pattern", [ls.Local(256), ls.Fixed(256, 8), ls.Strided(256), ls.LogSparse()], ids=str)
def test_a_long_sequence(pattern: ls.Pattern) -> None:
    length = 65536
    q, k, v = (torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cache = ls.PatternCache(pattern, capacity=length, num_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    for start, stop in ((0, 60000), (60000, 65500), *((t, t + 1) for t in range(65500, length))):
        part = [x[:, :, start:stop] for x in (q, k, v)]
        out = ls.attention_cached(*part, pattern, cache)
        cache.advance()
    wanted = ls.attention(q[:, :, -1:].float(), k.float(), v.float(), pattern, backend="reference")
    assert relative_error(out, wanted) <= 1e-2


def test_a_graph_of_a_step_is_right_at_every_length() -> None:
    pattern = ls.Fixed(32, 8) | ls.Global(2)
    q, k, v = make(8, 64, 64, torch.float32)
    wanted = ls.attention(q.double(), k.double(), v.double(), pattern, backend="reference")
    cache = cache_for(pattern, q, k, v)
    ls.attention_cached(*(x[:, :, :50] for x in (q, k, v)), pattern, cache)
    cache.advance()
    token = [x[:, :, 50:51].clone() for x in (q, k, v)]
    for _ in range(2):
        ls.attention_cached(*token, pattern, cache)
        cache.advance()
        cache.crop(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ls.attention_cached(*token, pattern, cache)
        cache.advance()
    cache.passed(-1)
    for position in range(50, LENGTH):
        for place, x in zip(token, (q, k, v), strict=True):
            place.copy_(x[:, :, position : position + 1])
        cache.passed(1)
        graph.replay()
        assert relative_error(out, wanted[:, :, position : position + 1]) <= 1e-5
    assert cache.lengths.tolist() == [LENGTH, LENGTH]
    assert cache.longest == LENGTH


@pytest.mark.parametrize(("backend", "tokens"), [("torch", 1), (None, 2)])
def test_a_graph_does_not_record_what_looks_at_lengths(backend, tokens) -> None:
    pattern = ls.Local(24)
    q, k, v = make(8, 64, 64, torch.float32)
    cache = cache_for(pattern, q, k, v)
    part = [x[:, :, :tokens].clone() for x in (q, k, v)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        part[0].clone()  # PyTorch warns of graphs that stay empty
        with pytest.raises(ls.UnsupportedError, match="a CUDA graph cannot record this step"):
            ls.attention_cached(*part, pattern, cache, backend=backend)


def test_it_takes_the_bytes_that_were_said() -> None:
    sizes = {"num_heads": 8, "head_dim": 64, "batch": 4, "dtype": torch.bfloat16}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = ls.PatternCache(ls.Fixed(128, 8), capacity=65536, device="cuda", **sizes)
    said = ls.cache_bytes(ls.Fixed(128, 8), 65536, **sizes)
    assert cache.nbytes == said
    # The allocator rounds each of the four tensors up to 512 bytes.
    assert said <= torch.cuda.memory_allocated() - before <= said + 4 * 512


def test_a_hundred_thousand_tokens_at_constant_memory() -> None:
    pattern, length = ls.Fixed(128, 8), 100_000
    cache = ls.PatternCache(pattern, capacity=length, num_heads=1, head_dim=64, device="cuda")
    q, k, v = (torch.randn(1, 1, length, 64, device="cuda") for _ in range(3))
    token = [x[:, :, :1].clone() for x in (q, k, v)]
    ls.attention_cached(*token, pattern, cache)
    cache.advance()
    cache.crop(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ls.attention_cached(*token, pattern, cache)
        cache.advance()
    cache.passed(-1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for position in range(length):
        for place, x in zip(token, (q, k, v), strict=True):
            place.copy_(x[:, :, position : position + 1])
        cache.passed(1)
        graph.replay()
    assert torch.cuda.memory_allocated() == before
    wanted = ls.attention(q[:, :, -1:], k, v, pattern, backend="reference")
    assert relative_error(out, wanted) <= 1e-5


# ---- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    config = ls.SparseTransformerConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        patterns=["Local(16) | Strided(16)", "Fixed(16, 2)"],
        initializer_scale=1.0,
    )
    torch.manual_seed(0)
    made = ls.SparseTransformerForCausalLM(config)
    torch.nn.init.normal_(made.lm_head.weight)
    return made.to("cuda").eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
def test_generate_writes_what_it_writes_without_a_cache(model, options) -> None:
    prompt = torch.randint(64, (2, 50), device="cuda")
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, **arguments, **options)
    plain = model.generate(prompt, use_cache=False, **arguments, **{**options, "prefill_chunk_size": None})
    assert torch.equal(cached, plain)


def test_a_replayed_model_gives_the_logits_of_the_whole_forward(model) -> None:
    from longstride.models import DecodeGraph, SparseTransformerCache

    ids = torch.randint(64, (3, 200), device="cuda")
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :70], past_key_values=cache)
        graph = DecodeGraph(model, cache)
        for position in range(70, 200):
            logits = graph.step(ids[:, position])
            assert relative_error(logits, whole[:, position]) <= 1e-4, position
            if position % 50 == 0:  # what the model does between replays counts
                cache.crop(-1)
                model(ids[:, position : position + 1], past_key_values=cache)
    assert cache.seen == 200


def test_sampled_bytes_are_those_of_the_cpu(model) -> None:
    from longstride.generation import cache_for as sample_cache
    from longstride.generation import sample_bytes

    prompt = bytes(range(40))
    drawn = []
    for device in ("cuda", "cpu"):
        model.to(device)
        cache = sample_cache(model, prompt, 60)
        drawn.append(b"".join(sample_bytes(model, prompt, 60, generator=torch.Generator(), temperature=0, cache=cache)))
    model.to("cuda")
    assert drawn[0] == drawn[1]
