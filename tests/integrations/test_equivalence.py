"""A sparsified model is the dense one with another mask: equal to what transformers computes with that mask."""

import pytest
import torch
from tests.integrations.conftest import DECODERS, ENCODERS

import longstride as ls

#: Windows of the models' own, by layer.
OWN_WINDOWS = {"mistral": "Local(5)", "qwen2": ["Causal()", "Local(5)"], "gemma3": ["Local(5)", "Causal()"]}


def results(model, tokens):
    """Logits or hidden states, and the gradient of every parameter."""
    model.zero_grad()
    out = model(tokens, use_cache=False)[0] if model.can_generate() else model(tokens)[0]
    out.sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def with_mask(model, tokens, patterns):
    """`results` of the dense model under the masks of `patterns`, layer by layer."""
    # Most models' eager attention takes its softmax in float32, whatever the weights are.
    model.set_attn_implementation("eager" if model.config.model_type == "bert" else "sdpa")
    length, heads = tokens.shape[1], model.config.num_attention_heads
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    masks = [
        torch.zeros(heads, length, length, dtype=torch.float64).masked_fill(~p.mask(length, heads=heads), -1e300)[None]
        for p in patterns
    ]

    def give(mask):
        return lambda _module, args, kwargs: (args, kwargs | {"attention_mask": mask})

    hooks = [
        module.register_forward_pre_hook(give(masks[n % len(masks)]), with_kwargs=True)
        for n, module in enumerate(attentions)
    ]
    found = results(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_causal_is_what_sdpa_computes(make, tokens, name):
    model = make(name)
    wanted = results(model, tokens)
    assert_same(results(ls.sparsify(model, OWN_WINDOWS.get(name, "Causal()")), tokens), wanted)


@pytest.mark.parametrize("name", DECODERS)
def test_patterns_by_layer_and_head_are_what_transformers_computes_with_their_masks(make, tokens, name):
    patterns = [ls.per_head(ls.Local(3), ls.Strided(4)), ls.Fixed(4, 1)]
    wanted = with_mask(make(name), tokens, patterns)
    assert_same(results(ls.sparsify(make(name), patterns), tokens), wanted)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    "pattern",
    [ls.Full(), ls.Local(4, lookahead=2), ls.longformer(6, 2), ls.Causal(), ls.bigbird(2, random_blocks=1)],
    ids=str,
)
def test_encoders_are_what_transformers_computes_with_the_mask(make, tokens, name, pattern):
    wanted = with_mask(make(name), tokens, [pattern])
    assert_same(results(ls.sparsify(make(name), pattern), tokens), wanted)


def test_modernbert_s_own_windows(make, tokens):
    # Global attention every second layer, from the first; 8 // 2 tokens on either side in the others.
    model = make("modernbert")
    wanted = results(model, tokens)
    assert_same(results(ls.sparsify(model, [ls.Full(), ls.Local(5, lookahead=4)]), tokens), wanted)


def test_a_decoder_that_is_told_to_attend_in_both_directions(make, tokens):
    model = make(is_causal=False)
    wanted = results(model, tokens)
    assert_same(results(ls.sparsify(model, "Full()"), tokens), wanted)
    pattern = ls.Local(3, lookahead=2)
    assert_same(results(ls.sparsify(model, pattern), tokens), with_mask(make(is_causal=False), tokens, [pattern]))


def test_a_vision_model_has_no_mask_and_no_layer_numbers():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    model, image = ViTModel(config).double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    wanted = model(image).last_hidden_state
    torch.testing.assert_close(ls.sparsify(model, "Full()")(image).last_hidden_state, wanted)
    assert not torch.allclose(ls.sparsify(model, "Local(2, lookahead=1)")(image).last_hidden_state, wanted)
    with pytest.raises(ls.ArgumentError, match="the layers of ViTModel do not know their numbers"):
        ls.sparsify(model, ["Full()", "Local(2, lookahead=1)"])


def test_sparsify_works_in_place_and_leaves_the_weights(make):
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert ls.sparsify(model, ls.Local(3)) is model
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_none_makes_it_dense_again(make, tokens, name):
    model = make(name)
    wanted, saved = model(tokens)[0], model.config.to_dict()
    ls.sparsify(model, "Local(2)")
    assert not torch.allclose(model(tokens)[0], wanted)
    ls.sparsify(model, None)
    assert torch.equal(model(tokens)[0], wanted)
    assert model.config.to_dict() == saved
    ls.sparsify(model, None)  # a dense model stays one
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_named_backend_is_the_one_that_runs(make, tokens, backend, monkeypatch):
    from longstride.integrations.transformers import interface

    asked = []
    monkeypatch.setattr(interface, "attention", lambda *a, **k: asked.append(k["backend"]) or ls.attention(*a, **k))
    model = ls.sparsify(make(), "Local(3)", backend=backend)
    model(tokens)
    assert asked == [backend, backend]
