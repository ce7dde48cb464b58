"""Small models of transformers, built from their configurations, with weights large enough to show a mistake."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 31,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODERN_BERT = SMALL | {
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "initializer_cutoff_factor": 2.0,
}
#: name: class, its configuration's class, its arguments. Qwen2 and Gemma 3 have layers with windows of their own.
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
}
ENCODERS = {
    "bert": ("BertModel", "BertConfig", SMALL | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", MODERN_BERT),
}


@pytest.fixture
def make():
    """Build a model by its name above, in float64 and for evaluation."""

    def build(name="llama", seed=0, dtype=torch.float64, **changes):
        model, config, arguments = (DECODERS | ENCODERS)[name]
        torch.manual_seed(seed)
        built = getattr(transformers, model)(getattr(transformers, config)(**(arguments | changes)))
        return built.to(dtype).eval()

    return build


@pytest.fixture
def tokens():
    """Token ids int64[2, 20], none of which is padding."""
    return torch.randint(1, 31, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fresh_compiler():
    """PyTorch counts how often a function is compiled anew, over all tests of a process, and gives up after eight."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
