"""generate() of a sparsified model makes its own cache, and writes with it what it writes with every other."""

import copy
import logging
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from tests.integrations.conftest import DECODERS
from tests.integrations.test_caches import left_padded
from torch import nn
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache

import longstride as ls
from longstride.integrations.transformers import SparsifiedCache, generating

PATTERNS = ["Local(4)", "per_head(Fixed(4, 1), Strided(3))"]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def said():
    """What generate() said about its cache: each sentence is logged once a process, so the log begins anew."""
    generating._logger.warning_once.cache_clear()
    sentences = []
    handler = logging.Handler()
    handler.emit = lambda record: sentences.append(record.getMessage())
    generating._logger.addHandler(handler)
    yield sentences
    generating._logger.removeHandler(handler)


def both(model, ids, **options):
    """What the model writes with its own cache, which is returned too; it is what it writes without any."""
    options = GREEDY | options
    torch.manual_seed(3)
    wanted = model.generate(ids, **options, use_cache=False).sequences
    torch.manual_seed(3)
    out = model.generate(ids, **options)
    assert torch.equal(out.sequences, wanted)
    return wanted, out.past_key_values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", DECODERS)
def test_its_own_cache_writes_what_no_cache_writes(make, tokens, name, options):
    model = ls.sparsify(make(name, initializer_range=0.15), PATTERNS)
    ids, mask = left_padded(tokens[:, :9], (0, 4))
    _, cache = both(model, ids, attention_mask=mask, **options)
    assert isinstance(cache, SparsifiedCache)
    rows = 2 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert (cache.capacity, cache.headroom, cache.rows.batch) == (18, 0, rows)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 2}], ids=str)
def test_it_holds_less_than_the_cache_of_transformers(make, options):
    model = ls.sparsify(make(max_position_embeddings=512), "Local(8)")
    ids = torch.randint(1, 31, (1, 200), generator=torch.Generator().manual_seed(0))
    options = GREEDY | options
    out = model.generate(ids, **options)
    dense = model.generate(ids, **options, cache_implementation="dynamic")
    assert torch.equal(out.sequences, dense.sequences)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.past_key_values.layers)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.float64, "batch": options["num_beams"]}
    assert out.past_key_values.nbytes == ls.cache_bytes([ls.Local(8)] * 2, 209, **sizes)
    assert out.past_key_values.nbytes < held / 20


def test_a_text_longer_than_the_model_s_positions(make, tokens):
    # Rotary positions go on, and so does the cache.
    _, cache = both(ls.sparsify(make(max_position_embeddings=24), "Local(4)"), tokens)
    assert cache.capacity == 29


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"max_new_tokens": 1}], ids=str)
def test_chunks_of_a_prompt_and_a_single_token(make, tokens, options):
    model = ls.sparsify(make(), PATTERNS)
    wanted = model.generate(tokens, **(GREEDY | options | {"use_cache": False, "prefill_chunk_size": None})).sequences
    out = model.generate(tokens, **(GREEDY | options))
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.past_key_values, SparsifiedCache)


def test_embeddings_instead_of_tokens(make, tokens):
    model = ls.sparsify(make(), PATTERNS)
    wanted = model.generate(tokens, **GREEDY).sequences[:, 20:]
    out = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **GREEDY)
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.past_key_values, SparsifiedCache)


@pytest.mark.parametrize("sparse_assistant", [False, True])
def test_assisted_generation(make, tokens, said, sparse_assistant):
    model, assistant = ls.sparsify(make(), PATTERNS), make(seed=1)
    if sparse_assistant:
        ls.sparsify(assistant, "Local(6)")
    _, cache = both_with_assistant(model, tokens[:1, :9], assistant_model=assistant)
    assert isinstance(cache, SparsifiedCache)
    assert cache.headroom == 128
    assert any("assists another model" in sentence for sentence in said) == sparse_assistant


@pytest.mark.parametrize("count", [3, 150])
def test_guesses_looked_up_in_the_prompt(make, tokens, count):
    model = ls.sparsify(make(max_position_embeddings=512), PATTERNS)
    prompt = tokens[:1, :9].repeat(1, 20)
    _, cache = both_with_assistant(model, prompt, prompt_lookup_num_tokens=count)
    assert isinstance(cache, SparsifiedCache)
    assert cache.headroom == max(128, count)


def test_its_own_first_layers_assist(make, tokens):
    model = ls.sparsify(make(num_hidden_layers=3), PATTERNS)
    _, cache = both_with_assistant(model, tokens[:1, :9], assistant_early_exit=1)
    assert len(cache.patterns) == 3


def both_with_assistant(model, prompt, **guesses):
    wanted = model.generate(prompt, **GREEDY, use_cache=False).sequences
    out = model.generate(prompt, **GREEDY, **guesses)
    assert torch.equal(out.sequences, wanted)
    return wanted, out.past_key_values


def test_what_the_user_asks_for_is_used(make, tokens):
    model = ls.sparsify(make(), PATTERNS)
    wanted = model.generate(tokens, **GREEDY).sequences
    mine = SparsifiedCache(model.config, capacity=40)
    for options, kind in (
        ({"past_key_values": mine}, SparsifiedCache),
        ({"past_key_values": DynamicCache()}, DynamicCache),
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, StaticCache),
        ({"use_cache": False}, type(None)),
    ):
        out = model.generate(tokens, **GREEDY, **options)
        assert torch.equal(out.sequences, wanted)
        assert type(out.past_key_values) is kind
    assert mine.get_seq_length() == 29
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(tokens, **GREEDY, past_key_values=mine, cache_implementation="static")


def test_it_comes_and_goes_with_the_patterns(make, tokens):
    model, other = make(), make()
    kinds = []
    for patterns in ("Local(4)", None, "Local(5)"):
        ls.sparsify(model, patterns)
        kinds.append(type(model.generate(tokens, **GREEDY).past_key_values))
    assert kinds == [SparsifiedCache, DynamicCache, SparsifiedCache]
    assert type(other.generate(tokens, **GREEDY).past_key_values) is DynamicCache
    model.set_attn_implementation("sdpa")
    assert type(model.generate(tokens, **GREEDY).past_key_values) is DynamicCache


class Wrapper(nn.Module):
    """As PEFT wraps a model: what it does not have itself is the model's."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "reload", "wrap", "compile"])
def test_it_goes_where_the_model_goes(make, tokens, tmp_path, way):
    model = ls.sparsify(make(), PATTERNS)
    wanted = model.generate(tokens, **GREEDY).sequences
    if way == "reload":
        model.save_pretrained(tmp_path)
        dense = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert type(dense.generate(tokens, **GREEDY).past_key_values) is DynamicCache
    went = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "reload": lambda _: LlamaForCausalLM.from_pretrained(tmp_path),
        "wrap": Wrapper,
        # generate() of what it returns runs the model itself.
        "compile": lambda model: torch.compile(model, backend="eager"),
    }[way](model)
    if way in ("deepcopy", "pickle"):
        ls.sparsify(model, None)
    out = went.generate(tokens, **GREEDY)
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.past_key_values, SparsifiedCache)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["module", "forward", "layer", "part"])
def test_a_compiled_model_gets_the_cache_of_transformers(make, tokens, said, way):
    model = ls.sparsify(make(num_hidden_layers=1), "Local(4)")
    wanted = model.generate(tokens, **GREEDY).sequences
    layers = model.model.layers
    if way == "module":
        model.compile(backend="eager")
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif way == "layer":
        layers[0].compile(backend="eager")
    else:
        layers[0] = torch.compile(layers[0], backend="eager")
    # One of them in earnest, since compiling takes long.
    with torch.compiler.set_stance("default" if way == "layer" else "force_eager"):
        for _ in range(2):
            out = model.generate(tokens, **(GREEDY | {"max_new_tokens": 3}))
            assert torch.equal(out.sequences, wanted[:, :23])
            assert type(out.past_key_values) is DynamicCache
    assert len(said) == 1
    assert "not a SparsifiedCache: the model is compiled" in said[0]
    assert "cache_implementation='static'" in said[0]


def test_a_compiled_part_without_attention_is_no_matter(make, tokens, said):
    model = ls.sparsify(make(), "Local(4)")
    model.model.layers[0].mlp.compile(backend="eager")
    assert isinstance(model.generate(tokens, **GREEDY).past_key_values, SparsifiedCache)
    assert said == []


TINY = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
GEMMA = {"vocab_size_per_layer_input": 31, "hidden_size_per_layer_input": 8}
LATENTS = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
#: Models whose caches hold something else than each layer's keys and values, all of a size: what is said of them.
OTHERS = {
    "DeepseekV3ForCausalLM": ({"num_key_value_heads": 4, "first_k_dense_replace": 2} | LATENTS, "keeps latents"),
    "DiffLlamaForCausalLM": ({}, "attend to it twice"),
    "Gemma3nForCausalLM": (
        GEMMA
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": WINDOW_AND_FULL * 2, "laurel_rank": 4}
        | {"activation_sparsity_pattern": [0.0] * 4},
        "read the keys of others",
    ),
    "Gemma4ForCausalLM": (GEMMA | {"global_head_dim": 16, "layer_types": WINDOW_AND_FULL}, "heads of different sizes"),
    "Lfm2ForCausalLM": ({"layer_types": ["conv", "full_attention"]}, "something else than keys and values"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_a_sparsified_cache_cannot_serve(tokens, said, name):
    changes, sentence = OTHERS[name]
    architecture = getattr(transformers, name)
    torch.manual_seed(0)
    model = ls.sparsify(architecture(architecture.config_class(**(TINY | changes))).double().eval(), "Local(4)")
    _, cache = both(model, tokens)
    assert type(cache) is DynamicCache
    assert len(said) == 1
    assert sentence in said[0]


@pytest.mark.parametrize("prompts", [False, True])
def test_adapters_that_prepare_the_inputs(make, tokens, said, prompts):
    """As PEFT does while it generates: LoRA's are those given, its prompts and prefixes come on top of them."""
    model = ls.sparsify(make(), "Local(4)")
    wrapper = Wrapper(model)
    wrapper.active_peft_config = SimpleNamespace(is_prompt_learning=prompts)
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = MethodType(lambda _, *args, **kwargs: prepare(*args, **kwargs), wrapper)
    out = model.generate(tokens, **GREEDY)
    assert type(out.past_key_values) is (DynamicCache if prompts else SparsifiedCache)
    assert ["puts tokens of its own" in line for line in said] == [True] * prompts


def test_layers_on_several_devices(make, tokens, said):
    model = ls.sparsify(make(), "Local(4)")
    model.hf_device_map = {"model": 0, "lm_head": "disk"}
    assert isinstance(model.generate(tokens, **GREEDY).past_key_values, SparsifiedCache)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert type(model.generate(tokens, **GREEDY).past_key_values) is DynamicCache
    assert "on several devices" in said[0]
    del model.hf_device_map
    model._tp_size = 2
    assert type(model.generate(tokens, **GREEDY).past_key_values) is DynamicCache


def test_gradients_through_what_is_written(make, tokens, said):
    model = ls.sparsify(make(), "Local(4)")
    logits = type(model).generate.__wrapped__(model, tokens, **GREEDY, output_logits=True).logits
    assert logits[-1].requires_grad
    assert "gradients are wanted" in said[0]
