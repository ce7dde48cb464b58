"""Every way to decode gives what the whole sequence gives at once."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import longstride as ls
from longstride.integrations.transformers import SparsifiedCache

PATTERNS = ["Local(4)", "per_head(Fixed(4, 1), Strided(3))"]
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "sparsified": lambda config: SparsifiedCache(config, 40),
}
#: A prompt, a chunk of it, a chunk of one, and token by token.
STEPS = ((0, 7), (7, 11), (11, 12), (12, 15), *((t, t + 1) for t in range(15, 20)))


def fed(model, ids, cache, mask=None):
    """The logits of all tokens, given to the cache step by step."""
    outs = []
    with torch.no_grad():
        for begin, end in STEPS:
            padding = {}
            if mask is not None:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
                padding = {"attention_mask": mask[:, :end], "position_ids": positions}
            outs.append(model(ids[:, begin:end], past_key_values=cache, **padding).logits)
    return torch.cat(outs, 1)


def greedy(model, prompt, count):
    """What the model writes when it reads everything again for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def left_padded(ids, pads):
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids * mask, mask


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_steps_equal_the_whole(make, tokens, cache, name):
    model = ls.sparsify(make(name), PATTERNS)
    whole = model(tokens, use_cache=False).logits
    torch.testing.assert_close(fed(model, tokens, CACHES[cache](model.config)), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("pads", [(0, 3), (9, 2)], ids=str)
def test_steps_of_padded_rows_equal_the_rows_alone(make, tokens, cache, backend, pads):
    model = ls.sparsify(make(), PATTERNS, backend=backend)
    ids, mask = left_padded(tokens, pads)
    logits = fed(model, ids, CACHES[cache](model.config), mask)
    for row, count in enumerate(pads):
        alone = model(ids[row : row + 1, count:], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, count:], alone, rtol=1e-9, atol=1e-9)


def test_right_padded_prompts_go_on_behind_their_padding(make, tokens):
    model = ls.sparsify(make(), PATTERNS)
    mask = torch.ones_like(tokens)
    mask[0, 4:7] = 0
    logits = fed(model, tokens, DynamicCache(), mask)
    alone = model(tokens[:1, mask[0].bool()], use_cache=False).logits[0]
    torch.testing.assert_close(logits[0, mask[0].bool()], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_s_own_window_at_every_step_of_its_rolling_cache(make, tokens, name, kind):
    from tests.integrations.test_equivalence import OWN_WINDOWS

    model = make(name)
    ids, mask = left_padded(tokens, (0, 3))
    wanted = fed(model, ids, CACHES[kind](model.config), mask)
    ls.sparsify(model, OWN_WINDOWS[name])
    cache = CACHES[kind](model.config)
    real = mask.bool()
    torch.testing.assert_close(fed(model, ids, cache, mask)[real], wanted[real], rtol=1e-9, atol=1e-9)
    assert True in cache.is_sliding


def test_mistral_s_recipe_is_mistral_s_window(make, tokens):
    model = make("mistral")
    wanted = model.generate(tokens, max_new_tokens=15, do_sample=False)
    ls.sparsify(model, ls.mistral(5))
    for options in ({}, {"cache_implementation": "static"}, {"past_key_values": SparsifiedCache(model.config)}):
        assert torch.equal(model.generate(tokens, max_new_tokens=15, do_sample=False, **options), wanted)


@pytest.mark.parametrize("pattern", ["Strided(3)", "Local(6)", "Fixed(8, 1)"])
def test_a_rolling_cache_that_forgets_too_much_is_refused(make, tokens, pattern):
    model = ls.sparsify(make("mistral"), pattern)
    with pytest.raises(ls.ArgumentError, match="reads keys that this model's sliding-window cache has forgotten"):
        model.generate(tokens, max_new_tokens=8, do_sample=False, cache_implementation="dynamic")
    for cache in (None, SparsifiedCache(model.config), DynamicCache()):
        written = model.generate(tokens, max_new_tokens=8, do_sample=False, past_key_values=cache)
        assert torch.equal(written, greedy(model, tokens, 8))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=str)
def test_generate_is_greedy(make, tokens, cache, name, options):
    model = ls.sparsify(make(name), PATTERNS)
    ids, mask = left_padded(tokens[:, :9], (0, 4))
    written = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        past_key_values=CACHES[cache](model.config),
        **options,
    )
    assert torch.equal(written[:1], greedy(model, ids[:1], 10))
    assert torch.equal(written[1:, 4:], greedy(model, ids[1:, 4:], 10))


@pytest.mark.parametrize("cache", CACHES)
def test_beams(make, tokens, cache):
    model = ls.sparsify(make(initializer_range=0.15), PATTERNS)
    ids, mask = left_padded(tokens[:, :9], (0, 4))
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    wanted = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options, past_key_values=CACHES[cache](model.config)), wanted)


def test_several_samples_of_a_prompt(make, tokens):
    model = ls.sparsify(make(initializer_range=0.15), PATTERNS)
    drawn = []
    for cache in (DynamicCache(), SparsifiedCache(model.config)):
        torch.manual_seed(3)
        options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3, "past_key_values": cache}
        drawn.append(model.generate(tokens[:, :9], **options))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_keeps_half_the_bytes(make, tokens, dtype):
    model = ls.sparsify(make(dtype=dtype), PATTERNS)
    cache = SparsifiedCache(model.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        model.generate(tokens, max_new_tokens=3, do_sample=False, past_key_values=cache)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "batch": 2}
    assert cache.nbytes == ls.cache_bytes(cache.patterns, 64, dtype=torch.bfloat16, **sizes)


def test_assisted_generation_takes_guesses_back(make, tokens):
    model, assistant = ls.sparsify(make(), PATTERNS), make(seed=1)
    prompt = tokens[:1, :9]
    cache = SparsifiedCache(model.config, headroom=32)
    options = {"max_new_tokens": 12, "do_sample": False, "assistant_model": assistant}
    assert torch.equal(model.generate(prompt, **options, past_key_values=cache), greedy(model, prompt, 12))


def test_a_conversation_goes_on_with_its_cache(make, tokens):
    model = ls.sparsify(make(), PATTERNS)
    cache = SparsifiedCache(model.config)
    first = model.generate(tokens[:1, :9], max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, tokens[:1, 9:14]], 1)
    second = model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(second, greedy(model, longer, 4))
    assert cache.get_seq_length() == 21
    cache.reset()
    assert torch.equal(model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache), second)


def test_a_cache_holds_what_the_patterns_may_read(make):
    model = ls.sparsify(make(max_position_embeddings=512), "Local(8)")
    cache = SparsifiedCache(model.config, 512)
    assert cache.nbytes == 0
    model.generate(torch.ones(1, 200, dtype=torch.long), max_new_tokens=3, do_sample=False, past_key_values=cache)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
    assert cache.nbytes == ls.cache_bytes([ls.Local(8)] * 2, 512, **sizes)
    assert cache.nbytes < ls.cache_bytes([ls.Causal()] * 2, 512, **sizes) / 40


def test_only_a_sparsified_model_takes_its_cache(make, tokens):
    model = ls.sparsify(make(), "Local(4)")
    cache = SparsifiedCache(model.config)
    ls.sparsify(model, None)
    with torch.no_grad(), pytest.raises(ls.UnsupportedError, match="gives no dense keys and values"):
        model(tokens, past_key_values=cache)
    with pytest.raises(ls.ArgumentError, match="no patterns in the configuration"):
        SparsifiedCache(model.config)
    other = ls.sparsify(make(), "Local(5)")
    with torch.no_grad(), pytest.raises(ls.ArgumentError, match=r"keeps what Local\(4\) reads"):
        other(tokens, past_key_values=cache)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": 2.5}, {"headroom": -1}, {"headroom": 2.5}], ids=str)
def test_sizes_of_a_cache_are_checked(make, options):
    with pytest.raises(ls.ArgumentError, match=r"(capacity|headroom)=.*at least [01]"):
        SparsifiedCache(ls.sparsify(make(), "Local(4)").config, **options)
    with pytest.raises(ls.ArgumentError, match=r"config is LlamaForCausalLM: give .* model.config"):
        SparsifiedCache(ls.sparsify(make(), "Local(4)"))


def test_layers_that_keep_something_else(make):
    config = ls.sparsify(make(), "Local(4)").config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ls.UnsupportedError, match=r"keep something else than keys and values \(linear_attention\)"):
        SparsifiedCache(config)


def test_a_full_cache_says_how_large_it_should_be(make, tokens):
    model = ls.sparsify(make(), "Local(4)")
    with pytest.raises(ls.ArgumentError, match="capacity of at least 20"):
        model.generate(tokens, max_new_tokens=4, past_key_values=SparsifiedCache(model.config, 10))


def test_a_cache_keeps_no_gradients(make, tokens):
    model = ls.sparsify(make(), "Local(4)")
    with pytest.raises(ls.UnsupportedError, match=r"a cache keeps no gradients: call it under torch.no_grad\(\)"):
        model(tokens, past_key_values=SparsifiedCache(model.config))


def test_a_backend_that_cannot_be_used_is_refused(make, tokens):
    model = ls.sparsify(make("mistral"), "Local(5)", backend="torch")
    with pytest.raises(ls.UnsupportedError, match="backend='torch': after a sliding-window cache"):
        model.generate(tokens, max_new_tokens=3, do_sample=False, cache_implementation="dynamic")
    written = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(written, greedy(model, tokens, 3))
