"""Generation with the cache that ``generate()`` makes: the same tokens as without, from fewer keys."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import longstride as ls
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models import SparseTransformerCache, SparseTransformerConfig

PATTERNS = [
    ["Local(4)", "Strided(4)"],
    ["Fixed(4, 1)"],
    ["per_head(Fixed(4, 1), Fixed(4, 1, offset=1))", "Local(3) | Global(2)"],
    ["RandomBlocks(4, 2) | Local(3)", "LogSparse()", "Causal()"],
]


@pytest.fixture(params=PATTERNS, ids=str)
def model(request, make_model):
    return make_model(patterns=request.param, pad_token_id=0, initializer_scale=0.7)


def generate(model, prompt, **options):
    """The same call with the cache and without."""
    # Without a mask, transformers takes tokens that are the padding's for padding.
    arguments = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
    torch.manual_seed(3)
    cached = model.generate(prompt, **arguments)
    torch.manual_seed(3)
    return cached, model.generate(prompt, use_cache=False, **{**arguments, "prefill_chunk_size": None})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_tokens_are_those_without_a_cache(model, tokens, options):
    cached, plain = generate(model, tokens[:, :11], **options)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_left_padded_prompts(model, tokens, options):
    prompt, mask = tokens.clone()[:, :12], torch.ones(2, 12, dtype=torch.long)
    prompt[1, :7], mask[1, :7] = 0, 0
    cached, plain = generate(model, prompt, attention_mask=mask, **options)
    assert torch.equal(cached, plain)
    alone, _ = generate(model, prompt[1:, 7:], **options)
    assert torch.equal(cached[1:, 7:], alone)


def test_logits_of_every_step_are_the_whole_forward_s(model, tokens):
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        steps = [model(tokens[:, :10], past_key_values=cache).logits]
        steps += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(10, 23)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 23


def test_ragged_chunks_on_either_side(model, tokens):
    """Rows that start or end within a chunk, and positions that are passed along."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 15:] = 0
    ids = tokens[:, :20]
    cache = SparseTransformerCache(model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        steps = [
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            ).logits
            for start, stop in ((0, 4), (4, 11), (11, 12), (12, 17), (17, 20))
        ]
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[kept], whole[kept], rtol=1e-9, atol=1e-9)
    assert cache.rows.lengths.tolist() == [11, 15]


def test_assisted_generation_takes_guesses_back(make_model, tokens):
    model = make_model(patterns=["Local(4)", "Fixed(4, 1)"], dtype=torch.float32)
    assistant = make_model(seed=1, patterns=["Local(3)"], dtype=torch.float32)
    prompt = tokens[:1, :8]
    plain = model.generate(prompt, max_new_tokens=25, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=25, do_sample=False, assistant_model=assistant), plain)
    found = model.generate(prompt, max_new_tokens=25, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found, plain)


def test_streaming_shows_each_token(make_model, tokens):
    shown = []

    class Shows(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            shown.extend(value.flatten().tolist())

        def end(self):
            shown.append("end")

    generated = make_model().generate(tokens[:1, :5], max_new_tokens=6, do_sample=False, streamer=Shows())
    assert shown == [*generated[0].tolist(), "end"]


def test_it_takes_what_it_said_and_far_less_than_a_dense_cache(make_model, tokens):
    model = make_model(patterns="Fixed(8, 1)", max_position_embeddings=2048)
    result = model.generate(tokens[:, :20], max_new_tokens=200, do_sample=False, return_dict_in_generate=True)
    cache = result.past_key_values
    assert isinstance(cache, SparseTransformerCache)
    assert (cache.capacity, cache.seen) == (219, 219)
    assert cache.nbytes == cache.bytes_for(2, torch.float64)
    dense = ls.cache_bytes([ls.Causal()] * 3, 219, batch=2, num_heads=2, head_dim=8, dtype=torch.float64)
    assert cache.nbytes < 0.2 * dense


def test_generation_goes_on_from_a_cache_that_was_returned(make_model, tokens):
    model = make_model()
    cache = SparseTransformerCache(model.config)
    first = model.generate(tokens[:, :9], max_new_tokens=6, do_sample=False, past_key_values=cache)
    again = model.generate(first, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(again, model.generate(tokens[:, :9], max_new_tokens=12, do_sample=False, use_cache=False))


def test_a_prompt_s_cache_serves_several_samples(make_model, tokens):
    model = make_model()
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        model(tokens[:1, :9], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        continued = torch.tensor([[1], [2], [3]])
        out = model(continued, past_key_values=cache).logits
        wanted = model(torch.cat([tokens[:1, :9].expand(3, -1), continued], 1)).logits[:, -1:]
    torch.testing.assert_close(out, wanted)
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.rows.batch == 1
    cache.reset()
    assert (cache.seen, cache.rows.longest) == (0, 0)


def test_use_cache_makes_one(make_model, tokens):
    with torch.no_grad():
        made = make_model()(tokens, use_cache=True).past_key_values
    assert isinstance(made, SparseTransformerCache)
    assert made.seen == 23
    assert make_model()(tokens).past_key_values is None


def test_what_transformers_asks_of_it(make_model):
    cache = SparseTransformerCache(make_model().config, capacity=30)
    assert (len(cache), cache.get_max_length(), cache.get_max_cache_shape(), cache.nbytes) == (3, 30, 30, 0)
    assert cache.layers[0].get_mask_sizes(4) == (4, 0)
    assert cache.layers[0].get_seq_length() == 0
    assert cache.layers[0].get_max_length() == 30
    assert not cache.is_compileable
    assert cache.is_croppable
    cache.crop(-3)  # nothing is there yet
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(UnsupportedError, match="gives no dense keys and values"):
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    assert "0 of 30 tokens seen" in repr(cache)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity=0: it must be a whole number from 1 to max_position_embeddings=48"),
        ({"capacity": 49}, "capacity=49"),
        ({"capacity": "x"}, "capacity=.x.: it must be a whole number"),
        ({"headroom": -1}, "headroom=-1"),
        ({"headroom": 0.5}, "headroom=0.5"),
    ],
    ids=str,
)
def test_sizes_out_of_range(make_model, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        SparseTransformerCache(make_model().config, **arguments)


def test_calls_that_do_not_fit(make_model, tokens):
    model = make_model()
    cache = SparseTransformerCache(model.config, capacity=10)
    with pytest.raises(UnsupportedError, match="a cache keeps no gradients"):
        model(tokens[:, :5], past_key_values=cache)
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache)
        with pytest.raises(ArgumentError, match="5 tokens and 6 more: this cache has room for 10"):
            model(tokens[:, 5:11], past_key_values=cache)
        with pytest.raises(ArgumentError, match="a batch of 1 rows: this cache holds 2"):
            model(tokens[:1, 5:6], past_key_values=cache)
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        with pytest.raises(ArgumentError, match="other real tokens among the first 5"):
            model(tokens[:, 5:6], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ArgumentError, match=r"it must be \[batch, length\] = \(2, 6\)"):
            model(tokens[:, 5:6], attention_mask=torch.ones(2, 1), past_key_values=cache)
        with pytest.raises(ArgumentError, match="position_ids must count"):
            model(tokens[:, 5:6], position_ids=torch.tensor([[4]]), past_key_values=cache)
        # A refused call leaves the cache as it was.
        out = model(tokens[:, 5:6], past_key_values=cache).logits
        torch.testing.assert_close(out, model(tokens[:, :6]).logits[:, -1:])


def test_another_model_s_cache(make_model, tokens):
    model = make_model()
    shallow = SparseTransformerCache(SparseTransformerConfig(**{**model.config.to_dict(), "num_hidden_layers": 2}))
    other = SparseTransformerCache(make_model(patterns="Local(4)").config)
    with torch.no_grad():
        with pytest.raises(ArgumentError, match="made for 2 layers and this model has 3"):
            model(tokens, past_key_values=shallow)
        with pytest.raises(ArgumentError, match=r"layer 1 of this cache keeps what Local\(4\) reads"):
            model(tokens, past_key_values=other)
        with pytest.raises(ArgumentError, match="past_key_values is DynamicCache"):
            model(tokens, past_key_values=DynamicCache())


def test_crops_that_cannot_be(make_model, tokens):
    model = make_model(patterns="Local(4)")
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    with pytest.raises(ArgumentError, match=r"give minus the number of tokens to take back, as in crop\(-3\)"):
        cache.crop(3)
    with pytest.raises(ArgumentError, match=r"Local\(4\) would read keys again that were evicted"):
        cache.crop(-3)
    assert cache.seen == 23
