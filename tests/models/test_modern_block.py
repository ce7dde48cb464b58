"""The model with the modern block: what the tests of the first block ask, asked of this one."""

import math

import pytest
import torch

from longstride.errors import ArgumentError
from longstride.models import (
    SparseTransformerCache,
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    parameter_count,
)

SCHEDULES = [["Local(4)", "Strided(4)"], "per_head(Local(4), Strided(4))", "Fixed(4, 1)", ["Causal()", "Local(5)"]]


@pytest.fixture
def modern(make_model):
    def make(**changes):
        return make_model(**({"block": "modern", "initializer_scale": 1.0} | changes))

    return make


@pytest.mark.parametrize("patterns", SCHEDULES, ids=str)
def test_a_later_token_never_changes_an_earlier_logit(modern, tokens, patterns):
    model = modern(patterns=patterns)
    before = model(tokens).logits
    for position in (1, 7, 22):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 5) % 17
        after = model(changed).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.isclose(after[:, position], before[:, position]).all()


def test_the_order_of_tokens_matters_and_their_place_does_not(modern):
    model = modern(patterns="Local(9)", num_hidden_layers=1)
    ids = torch.tensor([[3, 5, 8, 2]])
    swapped = model(torch.tensor([[5, 3, 8, 2]])).logits[:, -1]
    assert not torch.allclose(model(ids).logits[:, -1], swapped)
    # A window that holds the same tokens further along gives the same logits: positions are relative.
    window = torch.randint(17, (1, 9), generator=torch.Generator().manual_seed(0))
    later = torch.cat([torch.zeros(1, 20, dtype=torch.long), window], 1)
    torch.testing.assert_close(model(later).logits[:, -1], model(window).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_backends_agree(modern, tokens):
    logits = []
    for backend in ("reference", "torch", None):
        logits.append(modern(attention_backend=backend, qk_hidden_size=8)(tokens).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patterns", SCHEDULES, ids=str)
def test_logits_of_every_step_are_the_whole_forward_s(modern, tokens, patterns):
    model = modern(patterns=patterns)
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        steps = [model(tokens[:, :10], past_key_values=cache).logits]
        steps += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(10, 23)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)


def test_ragged_chunks_count_from_each_row_s_own_start(modern, tokens):
    model = modern()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 15:] = 0
    ids = tokens[:, :20]
    cache = SparseTransformerCache(model.config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        steps = [
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            for start, stop in ((0, 4), (4, 11), (11, 12), (12, 17), (17, 20))
        ]
        alone = model(ids[:1, 9:]).logits
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[kept], whole[kept], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole[:1, 9:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generated_tokens_are_those_without_a_cache(modern, tokens, options):
    model = modern(pad_token_id=0, dtype=torch.float32)
    prompt = tokens[:1, :9]
    arguments = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, **arguments, **options)
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments, **plain))


def test_left_padded_prompts_generate_what_they_generate_alone(modern, tokens):
    model = modern(pad_token_id=0)
    prompt, mask = tokens.clone()[:, :12], torch.ones(2, 12, dtype=torch.long)
    prompt[1, :7], mask[1, :7] = 0, 0
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
    alone = model.generate(prompt[1:, 7:], attention_mask=mask[1:, 7:], max_new_tokens=12, do_sample=False)
    assert torch.equal(generated[1:, 7:], alone)


def test_initial_weights():
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        block="modern",
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=64,
        patterns="Local(8)",
    )
    named = dict(SparseTransformerForCausalLM(config).named_parameters())
    assert torch.equal(named["lm_head.weight"], torch.zeros(256, 128))
    assert config.intermediate_size == 344
    std = {
        "model.embed_tokens.weight": 0.125 / math.sqrt(128),
        "model.layers.5.attention.qkv_proj.weight": 0.125 / math.sqrt(128),
        "model.layers.5.attention.out_proj.weight": 0.125 / math.sqrt(128) / 4,
        "model.layers.5.feed_forward.gate_up_proj.weight": 0.125 / math.sqrt(128),
        "model.layers.5.feed_forward.down_proj.weight": 0.125 / math.sqrt(344) / 4,
    }
    for name, expected in std.items():
        assert named[name].std().item() == pytest.approx(expected, rel=0.03), name
    norms = {name for name in named if "norm" in name}
    assert len(norms) == 8 * 4 + 1
    for name in norms:
        assert torch.equal(named[name], torch.ones_like(named[name])), name
    assert not any("bias" in name or "position" in name for name in named)


def test_epsilon_and_base_of_the_configuration_reach_the_layers(modern):
    model = modern(layer_norm_eps=0.25, rotary_base=77.0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [0.25] * 13
    assert model.model.rotary_positions.base == 77.0


def test_first_loss_is_uniform_and_training_lowers_it(tokens):
    torch.manual_seed(0)
    model = SparseTransformerForCausalLM(
        SparseTransformerConfig(
            block="modern",
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


def test_a_plain_from_pretrained_gives_identical_logits(modern, tokens, tmp_path):
    model = modern(dtype=torch.float32, qk_hidden_size=8, rotary_base=50.0)
    model.save_pretrained(tmp_path)
    loaded, report = SparseTransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    assert str(loaded) == str(model)
    assert list(model.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(modern, tokens, dtype):
    exact = modern(initializer_scale=0.5)(tokens).logits
    rounded = modern(initializer_scale=0.5, dtype=dtype)(tokens).logits
    assert rounded.dtype == dtype
    assert (rounded.double() - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_parameters_by_part():
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "patterns": "Local(8)"}
    counts = parameter_count(SparseTransformerConfig(block="modern", **sizes))
    assert counts.position_embedding == 0
    assert counts.attention == 3 * 4 * 96**2
    assert counts.feed_forward == 3 * 3 * 96 * 256
    assert counts.norms == 3 * (2 * 96 + 2 * 24) + 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "post_norm"}, "block='post_norm': it must be one of 'sparse_transformer', 'modern'"),
        ({"position_axes": [8, 8]}, "the modern block has rotary positions and no position embeddings"),
        ({"qk_hidden_size": 6}, "qk_hidden_size=6 gives 2 heads of 3: rotary positions need heads of even width"),
        ({"rotary_base": 0}, "rotary_base=0: it must be a number greater than 0"),
    ],
)
def test_illegal_values_are_named(modern, changes, message):
    with pytest.raises(ArgumentError, match=message):
        modern(**changes)
