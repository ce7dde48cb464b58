"""What a pattern cannot do is said in one sentence: what was given, what is allowed, what to do."""

import pytest
import torch
import transformers
from tests.integrations.conftest import GROUPED

import longstride as ls


def built(model, config, **arguments):
    return getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()


@pytest.mark.parametrize("patterns", [[], 3, ["Local(4)", 3], {"Local(4)": 1}, torch.ones(2)], ids=str)
def test_what_is_no_pattern(make, patterns):
    with pytest.raises(ls.ArgumentError, match="give a pattern, its text, or a list of those"):
        ls.sparsify(make(), patterns)


def test_other_values(make):
    with pytest.raises(ls.ArgumentError, match="model is Linear: it must be a transformers PreTrainedModel"):
        ls.sparsify(torch.nn.Linear(2, 2), "Local(4)")
    with pytest.raises(ls.ArgumentError, match="3 patterns for 2 layers: give at most one for each"):
        ls.sparsify(make(), ["Local(4)"] * 3)
    for backend in ("turbo", 3, ["torch"]):
        with pytest.raises(ls.ArgumentError, match=r"backend=.*: known backends are 'triton'"):
            ls.sparsify(make(), "Local(4)", backend=backend)
    with pytest.raises(ls.PatternError, match=r"unknown pattern 'Lcal' \(did you mean Local\?\)"):
        ls.sparsify(make(), "Lcal(4)")


@pytest.mark.parametrize("pattern", ["Full()", "Local(4, lookahead=1)", "per_head(Causal(), Strided(3, causal=False))"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bidirectional_pattern_on_a_decoder(make, tokens, pattern, name):
    model = make(name)
    dense = model(tokens).logits
    with pytest.raises(ls.PatternError, match="lets a token attend to later ones"):
        ls.sparsify(model, pattern)
    assert torch.equal(model(tokens).logits, dense)
    # Past sparsify, as from a file, the layers notice.
    model.config.longstride = {"patterns": [pattern]}
    with pytest.raises(ls.UnsupportedError, match="lets a token attend to later ones, and this model is a decoder"):
        model(tokens)


def test_patterns_that_need_a_length(make):
    with pytest.raises(ls.PatternError, match="depends on the length of the sequence"):
        ls.sparsify(make(), "RandomBlocks(4, 1, causal=False) & Causal()")
    table = torch.ones(4, 4, dtype=torch.bool).tril()
    with pytest.raises(ls.PatternError, match="covers 16 positions, not 64"):
        ls.sparsify(make(), ls.BlockSparse(table, 4) & ls.Causal())
    with pytest.raises(ls.PatternError, match="covers 16 positions, not 64"):
        ls.sparsify(make("bert"), ls.BlockSparse(table, 4))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_heads_that_do_not_divide(make, name):
    with pytest.raises(ls.PatternError, match="4 heads do not divide into 3 equal groups"):
        ls.sparsify(make(name), ls.per_head(ls.Local(1), ls.Local(2), ls.Local(3)))


def test_a_model_that_does_not_go_through_the_interface():
    model = built("BloomForCausalLM", "BloomConfig", vocab_size=31, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ls.UnsupportedError, match="BloomForCausalLM does not call its attention through"):
        ls.sparsify(model, "Local(4)")


def test_a_model_that_has_patterns_already():
    model = ls.SparseTransformerForCausalLM(
        ls.SparseTransformerConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, patterns="Local(4)"
        )
    )
    with pytest.raises(ls.UnsupportedError, match="SparseTransformerForCausalLM does not call its attention through"):
        ls.sparsify(model, "Local(8)")


def test_caps_on_scores():
    sizes = GROUPED | {"head_dim": 8}
    model = built("Gemma2ForCausalLM", "Gemma2Config", **sizes)
    with pytest.raises(ls.UnsupportedError, match=r"caps its scores \(attn_logit_softcapping\)"):
        ls.sparsify(model, "Local(4)")
    model.config.longstride = {"patterns": ["Local(4)"]}
    with pytest.raises(ls.UnsupportedError, match=r"scores that are capped \(softcap\)"):
        model(torch.ones(1, 4, dtype=torch.long))
    without = built("Gemma2ForCausalLM", "Gemma2Config", **sizes, attn_logit_softcapping=None)
    ls.sparsify(without, "Local(4)")(torch.ones(1, 4, dtype=torch.long))


def test_attention_sinks():
    model = built(
        "GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ls.UnsupportedError, match="GptOssForCausalLM has attention sinks"):
        ls.sparsify(model, "Local(4)")
    model.config.longstride = {"patterns": ["Local(4)"]}
    with pytest.raises(ls.UnsupportedError, match=r"attention sinks \(s_aux\)"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_cross_attention(make):
    t5 = built("T5ForConditionalGeneration", "T5Config", vocab_size=31, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    bert = make("bert", is_decoder=True, add_cross_attention=True)
    for model in (t5, bert):
        with pytest.raises(ls.UnsupportedError, match="attends to an encoder"):
            ls.sparsify(model, "Local(4)")
    bert.config.longstride = {"patterns": ["Causal()"]}
    ids, states = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 6, 32, dtype=torch.float64)
    with pytest.raises(ls.UnsupportedError, match="4 queries and 6 keys without a causal order: cross-attention"):
        bert(ids, encoder_hidden_states=states, encoder_attention_mask=torch.ones(1, 6))


def test_several_models_none_of_which_is_a_language_model():
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=part, vision_config=part))
    with pytest.raises(ls.UnsupportedError, match=r"CLIPModel consists of several models .*: sparsify the one"):
        ls.sparsify(model, "Local(4)")


def test_chunks_of_the_model_s_own(make):
    model = make()
    model.config.attention_chunk_size = 8
    with pytest.raises(ls.UnsupportedError, match="attends by chunks of its own"):
        ls.sparsify(model, "Local(4)")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_attention_weights(make, tokens, name):
    model = ls.sparsify(make(name), "Local(4)")
    with pytest.raises(ls.UnsupportedError, match="output_attentions=True has nothing to return"):
        model(tokens, output_attentions=True)
    model(tokens, output_hidden_states=True)
    eager = make(name)
    eager.set_attn_implementation("eager")
    eager.config.output_attentions = True
    with pytest.raises(ls.UnsupportedError, match=r"has config.output_attentions=True"):
        ls.sparsify(eager, "Local(4)")


@pytest.mark.parametrize(
    ("name", "setting"),
    [("llama", "attention_dropout"), ("gpt2", "attn_pdrop"), ("bert", "attention_probs_dropout_prob")],
)
def test_attention_dropout_in_training(make, tokens, name, setting):
    model = ls.sparsify(make(name, **{setting: 0.25}), "Local(4)")
    model(tokens)
    with pytest.raises(ls.UnsupportedError, match=rf"attention dropout of 0.25: .*{setting}.* to 0"):
        model.train()(tokens)


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, 20, 20), torch.ones(2, 1, 20, 20, dtype=torch.bool)], ids=str)
def test_a_mask_for_every_pair(make, tokens, mask):
    for name in ("llama", "bert"):
        model = ls.sparsify(make(name), "Local(4)")
        with pytest.raises(ls.UnsupportedError, match=r"a mask \[2, 1, 20, 20\] of torch.* for every pair"):
            model(tokens, attention_mask=mask.double() if mask.is_floating_point() else mask)


def test_a_share_of_the_heads(make, tokens):
    for patterns, refused in (("per_head(Local(2), Strided(2))", True), ("Local(2)", False)):
        model = ls.sparsify(make(), patterns)
        model.config.num_attention_heads = 8  # of which this device has 4
        if refused:
            with pytest.raises(ls.UnsupportedError, match="tells heads apart, and this layer has 4 of 8"):
                model(tokens)
        else:
            model(tokens)


def test_layers_that_are_called_without_a_mask(make):
    model = ls.sparsify(make(), "Local(4)")
    hidden = torch.zeros(1, 4, 32, dtype=torch.float64)
    turned = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(ls.UnsupportedError, match="no mask came with these tokens"):
        model.model.layers[0].self_attn(hidden, turned)


def test_a_mask_that_is_cut_between_the_layers(make, tokens):
    model = ls.sparsify(make(), "Local(4)")
    model.model.layers[1].register_forward_pre_hook(
        lambda _module, args, given: (args, given | {"attention_mask": given["attention_mask"][:, :, -10:]}),
        with_kwargs=True,
    )
    with pytest.raises(ls.UnsupportedError, match="cuts or changes its mask on the way to its layers"):
        model(tokens)


def test_masks_that_a_model_lays_over_its_own():
    from transformers.masking_utils import bidirectional_mask_function, create_causal_mask

    config = transformers.LlamaConfig(**GROUPED, attn_implementation="longstride")
    asked = {"config": config, "inputs_embeds": torch.zeros(2, 6, 32), "attention_mask": None, "past_key_values": None}
    with pytest.raises(ls.UnsupportedError, match="lays a mask of its own over the usual one"):
        create_causal_mask(**asked, or_mask_function=bidirectional_mask_function)
    with pytest.raises(ls.ArgumentError, match="lets some tokens see later ones"):
        create_causal_mask(**asked, block_sequence_ids=torch.tensor([[-1, 0, 0, 0, -1, -1]] * 2))


def test_the_attention_without_patterns(tokens):
    config = transformers.LlamaConfig(**GROUPED, attn_implementation="longstride")
    with pytest.raises(ls.ArgumentError, match=r"no patterns in the configuration: call longstride.sparsify\(model"):
        transformers.LlamaForCausalLM(config)(tokens)
