import pytest
import torch

from longstride.errors import ArgumentError, UnsupportedError


def step_by_step(model, prompt, new_tokens):
    ids = prompt
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("patterns", [["Local(4)", "Strided(4)"], "Fixed(4, 1)"], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_greedy_generation_is_the_argmax_of_every_step(make_model, tokens, patterns, arguments):
    model = make_model(patterns=patterns)
    prompt = tokens[:, :5]
    generated = model.generate(prompt, max_new_tokens=14, do_sample=False, **arguments)
    assert torch.equal(generated, step_by_step(model, prompt, 14))


def test_left_padded_prompts_generate_what_they_generate_alone(make_model, tokens):
    model = make_model(pad_token_id=0)
    prompts = [tokens[0, :7], tokens[1, :3]]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 7 - len(prompt) :], mask[row, 7 - len(prompt) :] = prompt, 1
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(generated[row, 7:], step_by_step(model, prompt[None], 12)[0, len(prompt) :])


def test_right_padded_prompts_are_refused(make_model):
    model = make_model(pad_token_id=0)
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    with pytest.raises(ArgumentError, match="pad on the left to generate"):
        model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False)


def test_beam_search_finds_at_least_as_likely_a_text_and_one_beam_is_greedy(make_model, tokens):
    model = make_model(initializer_scale=0.7)
    prompt = tokens[:1, :5]

    def log_likelihood(ids):
        logs = model(ids).logits.log_softmax(-1)[0, 4:-1]
        return logs.gather(1, ids[0, 5:, None]).sum().item()

    greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)
    beams = model.generate(
        prompt, max_new_tokens=6, do_sample=False, num_beams=4, return_dict_in_generate=True, output_scores=True
    )
    assert log_likelihood(beams.sequences) >= log_likelihood(greedy)
    # Beams that were scored on another past than their own would report another likelihood.
    assert beams.sequences_scores.item() * 6 == pytest.approx(log_likelihood(beams.sequences), rel=1e-4)


def test_sampling_follows_the_models_distribution(make_model, tokens):
    model = make_model(initializer_scale=0.7)
    prompt = tokens[:1, :6]
    expected = model(prompt).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(prompt.repeat(4000, 1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    frequency = drawn.bincount(minlength=17) / 4000
    assert (frequency - expected).abs().max() < 0.03


def test_prompts_as_embeddings(make_model, tokens):
    model = make_model()
    prompt = tokens[:, :5]
    embeds = model.get_input_embeddings()(prompt)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=9, do_sample=False)
    assert torch.equal(generated, step_by_step(model, prompt, 9)[:, 5:])
    both = model.generate(prompt, inputs_embeds=embeds, max_new_tokens=9, do_sample=False)
    assert torch.equal(both, step_by_step(model, prompt, 9))


def test_generation_up_to_the_context_and_not_past_it(make_model, tokens):
    model = make_model(max_position_embeddings=12)
    prompt = tokens[:1, :5]
    # The last new token is never read: 12 positions make 13 tokens.
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).shape == (1, 13)
    with pytest.raises(ArgumentError, match="13 tokens and max_position_embeddings=12"):
        model.generate(prompt, max_new_tokens=9, do_sample=False)


def test_other_caches_are_refused(make_model, tokens):
    from transformers import DynamicCache

    model = make_model()
    with pytest.raises(ArgumentError, match="past_key_values is DynamicCache"):
        model.generate(tokens, max_new_tokens=2, do_sample=False, past_key_values=DynamicCache())
    with pytest.raises(UnsupportedError, match="cache_implementation='static': this model has a cache of its own"):
        model.generate(tokens, max_new_tokens=2, do_sample=False, cache_implementation="static")
