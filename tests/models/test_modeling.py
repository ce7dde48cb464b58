import math

import pytest
import torch
import torch.nn.functional as F

from longstride.errors import ArgumentError, PatternError, UnsupportedError
from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM

SCHEDULES = [
    ["Local(4)", "Strided(4)"],
    "Local(4) | Strided(4)",
    "per_head(Local(4), Strided(4))",
    ["Causal()", "Local(5)"],
    "Fixed(4, 1)",
]


@pytest.mark.parametrize("patterns", SCHEDULES, ids=str)
def test_a_later_token_never_changes_an_earlier_logit(make_model, tokens, patterns):
    model = make_model(patterns=patterns)
    before = model(tokens).logits
    assert before.shape == (2, 23, 17)
    for position in (1, 7, 8, 22):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 5) % 17
        after = model(changed).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.isclose(after[:, position], before[:, position]).all()


def test_two_factorised_layers_let_every_earlier_token_matter(make_model, tokens):
    model = make_model(num_hidden_layers=2)
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 22].square().sum().backward()
    assert (embeds.grad[0].abs().sum(-1) > 0).all()
    assert (embeds.grad[1] == 0).all()


@pytest.mark.parametrize("patterns", SCHEDULES, ids=str)
def test_backends_agree(make_model, tokens, patterns):
    logits, gradients = [], []
    for backend in ("reference", "torch", None):
        model = make_model(patterns=patterns, attention_backend=backend, qk_hidden_size=8)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for other in (1, 2):
        torch.testing.assert_close(logits[other], logits[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-9, atol=1e-10)


def test_an_unknown_backend_is_refused_when_the_model_is_built(make_model):
    with pytest.raises(ArgumentError, match=r"backend='quantum': known backends are .*'reference'"):
        make_model(attention_backend="quantum")


def test_initial_weights():
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        hidden_size=128, num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=16384, qk_hidden_size=64
    )
    model = SparseTransformerForCausalLM(config)
    named = dict(model.named_parameters())
    assert torch.equal(named["lm_head.weight"], torch.zeros(256, 128))
    assert torch.equal(model(torch.zeros(1, 9, dtype=torch.long)).logits, torch.zeros(1, 9, 256))
    std = {
        "model.embed_tokens.weight": 0.125 / math.sqrt(128),
        "model.embed_positions.weight": 0.125 / math.sqrt(128 * 2),
        "model.layers.5.attention.qkv_proj.weight": 0.125 / math.sqrt(128),
        "model.layers.5.attention.out_proj.weight": 0.125 / math.sqrt(128) / math.sqrt(16),
        "model.layers.5.feed_forward.up_proj.weight": 0.125 / math.sqrt(128),
        "model.layers.5.feed_forward.down_proj.weight": 0.125 / math.sqrt(512) / math.sqrt(16),
    }
    for name, expected in std.items():
        assert named[name].std().item() == pytest.approx(expected, rel=0.03), name
    for name, parameter in named.items():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones(128)), name


def test_scale_and_epsilon_of_the_configuration_reach_the_layers(make_model):
    model = make_model(hidden_size=64, initializer_scale=0.5, layer_norm_eps=0.25)
    assert model.model.layers[1].attention.qkv_proj.weight.std().item() == pytest.approx(0.5 / 8, rel=0.03)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [0.25] * 7


def test_first_loss_is_uniform_and_training_lowers_it(tokens):
    torch.manual_seed(0)
    model = SparseTransformerForCausalLM(
        SparseTransformerConfig(
            vocab_size=17,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            patterns=["Local(4)", "Strided(4)"],
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(17), abs=1e-6)
    assert losses[-1] < 0.2


def test_labels_are_shifted_inside_and_minus_100_is_ignored(make_model, tokens):
    model = make_model(dtype=torch.float32)
    labels = tokens.clone()
    labels[0, :10] = -100
    logits = model(tokens).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)
    # The Trainer divides the sum by the count over all accumulated batches.
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    scaled = model(tokens, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(scaled, summed / 100)


def test_inputs_embeds_replace_the_token_embeddings(make_model, tokens):
    model = make_model()
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


def test_logits_to_keep(make_model, tokens):
    model = make_model()
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])


def test_hidden_states_and_tuples(make_model, tokens):
    model = make_model()
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    positions = model.model.embed_positions(torch.arange(23))
    torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(tokens) + positions)
    assert torch.equal(model(tokens, return_dict=False)[0], output.logits)


def checkpoint_blocks(model, use_reentrant=False):
    # transformers 5.23 has renamed it and warns at the old name; 5.17 knows the old name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones(make_either, tokens, use_reentrant):
    gradients = []
    for checkpoint in (False, True):
        model = make_either(dropout=0.2).train()
        if checkpoint:
            checkpoint_blocks(model, use_reentrant)
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        torch.manual_seed(3)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_checkpointing_recomputes_every_block(make_model, tokens):
    model = make_model().train()
    checkpoint_blocks(model)
    calls = []
    for layer in model.model.layers:
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
    loss = model(tokens, labels=tokens).loss
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6


def test_dropout_only_in_training(make_model, tokens):
    model = make_model(dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_tied_word_embeddings(make_model):
    model = make_model(tie_word_embeddings=True, initializer_scale=0.125)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_embeddings_do_not_start_at_zero():
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True
    )
    model = SparseTransformerForCausalLM(config)
    assert model.lm_head.weight.std().item() == pytest.approx(0.125 / 8, rel=0.05)
    model.apply(model._init_weights)
    assert model.lm_head.weight.std().item() == pytest.approx(0.125 / 8, rel=0.05)


def test_bfloat16(make_model, tokens):
    exact = make_model(initializer_scale=0.5)(tokens).logits
    rounded = make_model(initializer_scale=0.5, dtype=torch.bfloat16)(tokens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_autocast_keeps_the_residual_stream_in_float32(make_either, tokens):
    model = make_either(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, labels=tokens, output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(make_either, tokens):
    model = make_either(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    padded = compiled(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded, model(tokens, attention_mask=mask).logits)
    compiled(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"input_ids": torch.zeros(1, 49, dtype=torch.long)},
            ArgumentError,
            "49 tokens and max_position_embeddings=48",
        ),
        ({}, ArgumentError, "exactly one of input_ids .* and inputs_embeds"),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "inputs_embeds": torch.zeros(1, 4, 16)},
            ArgumentError,
            "exactly one",
        ),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "past_key_values": ()},
            ArgumentError,
            "past_key_values is tuple: this model's cache is a SparseTransformerCache",
        ),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "output_attentions": True},
            UnsupportedError,
            "never forms its weights",
        ),
    ],
)
def test_bad_calls(make_model, arguments, error, message):
    with pytest.raises(error, match=message):
        make_model()(**arguments)


def test_the_whole_context_fits(make_model):
    assert make_model()(torch.zeros(1, 48, dtype=torch.long)).logits.isfinite().all()


def test_a_configuration_that_was_changed_later_is_checked_again():
    config = SparseTransformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, patterns="Local(4)"
    )
    config.patterns = ["Full()"]
    with pytest.raises(PatternError, match=r"Full\(\): this pattern lets a token attend to later ones"):
        SparseTransformerForCausalLM(config)
    config.patterns = "Strided(4)"
    assert str(SparseTransformerForCausalLM(config).model.layers[0].attention.pattern) == "Strided(4)"
    config.num_attention_heads = 3
    with pytest.raises(ArgumentError, match="hidden_size=16 is not divisible by num_attention_heads=3"):
        SparseTransformerForCausalLM(config)


def test_another_attention_implementation_is_refused():
    config = SparseTransformerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        patterns="Local(4)",
        attn_implementation="sdpa",
    )
    with pytest.raises(ArgumentError, match=r"attn_implementation='sdpa'.*config\.attention_backend"):
        SparseTransformerForCausalLM(config)
